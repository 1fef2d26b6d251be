"""From a prompt to what is kept: tokenise, score, select, spans.

The whole of what a drafter does, below the wire and without the queue: the service runs `skim` in
its worker thread, a benchmark or a test calls it directly. Refuses protected and query ranges past
the prompt's end, and a prompt of more tokens than the server takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from drafter_svc.backend import AttentionConfig, ChunkScores, ScoreInput
from drafter_svc.drafter import Drafter
from drafter_svc.selection import (
    Selection,
    SelectionConfig,
    chunk_sizes,
    forced_chunks,
    kept_spans,
    select,
    token_ranges,
)
from modelfile.tokenizer import TokenizedText, Tokenizer
from skim.errors import InvalidRequest, PromptTooLong
from skim.spans import Span, round_outward
from skim.wire import fit_ranges

CHUNK_TOKENS = 32


@dataclass(frozen=True)
class Ask:
    """What a request wants, checked; ranges in bytes of its prompt, not yet held against it.

    `model` empty means whichever is loaded, `query` None the end of the prompt.
    `protect_tail_tokens` counts at the end of the query and never reaches in front of it.
    """

    request_id: str = ""
    model: str = ""
    scorer: str = "specprefill"
    lookahead_tokens: int = 0
    seed: int = 0
    pool_kernel: int = 13
    last_token_query: bool = True
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    protected: tuple[Span, ...] = ()
    query: Span | None = None
    protect_tail_tokens: int = 0
    control_ranges: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt in a drafter's tokens.

    Attributes:
        text: the UTF-8 bytes.
        ids: int32 [num_tokens].
        ends: int64 [num_tokens], end of each token in bytes; one that stands for no text is empty.
        tokenizer: whose ids they are.
    """

    text: bytes
    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Skimmed:
    """What is kept of a prompt, and how it came about."""

    spans: list[Span]
    selection: Selection
    scores: ChunkScores
    prompt_tokens: int
    forward_s: float
    select_s: float


def make_prompt(text: bytes, tokens: TokenizedText, tokenizer: Tokenizer) -> Prompt:
    """Join a prompt and its tokens; a beginning-of-sequence token goes in front where it must."""
    ids, ends, bos = tokens.ids, tokens.ends, tokenizer.bos_id
    # A chat template may write it by itself: one is enough.
    if tokenizer.add_bos and bos is not None and ids[:1].tolist() != [bos]:
        ids = np.concatenate((np.array([bos], np.int32), ids))
        ends = np.concatenate((np.zeros(1, np.int64), ends))
    return Prompt(text, ids, ends, tokenizer)


def tokenise(text: bytes, ask: Ask, tokenizer: Tokenizer) -> Prompt:
    """Tokenise a whole prompt at once, on the tokenizer's threads."""
    return make_prompt(text, tokenizer.encode(text, ask.control_ranges), tokenizer)


def check_ranges(ask: Ask, text: bytes) -> None:
    """Refuse a range that ends past the prompt (InvalidRequest, by the name of its field)."""
    fit_ranges(ask.protected, "config.protected", text)
    fit_ranges(ask.control_ranges, "config.control_ranges", text)
    if ask.query is not None and ask.query.end > len(text):
        got, allowed = f"[{ask.query.begin}, {ask.query.end})", f"inside the {len(text)} bytes"
        raise InvalidRequest.field_value("config.query", got, f"{allowed} of the prompt")


def check_tokens(prompt: Prompt, limit: int) -> None:
    """Refuse a prompt of more tokens than this server takes (PromptTooLong)."""
    if prompt.ids.size > limit:
        raise PromptTooLong(
            f"prompt must be at most {limit} tokens of this drafter, got {prompt.ids.size}",
            field="prompt",
            metadata={"limit": str(limit), "got": str(prompt.ids.size)},
        )


def skim(
    drafter: Drafter,
    prompt: Prompt,
    ask: Ask,
    *,
    stop: threading.Event | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Skimmed:
    """Score a prompt and choose what to keep, in the calling thread.

    Args:
        prompt: in this drafter's tokens.
        stop: set by anybody to abandon the pass.
        progress: called as (layers done, layers in all).
    Raises:
        Cancelled: `stop` was set.
        InvalidRequest: a range ends past the prompt, or look-ahead does not fit.
    """
    check_ranges(ask, prompt.text)
    begin_s = time.monotonic()
    query = _query_tokens(prompt, ask)
    request = ScoreInput(
        ids=prompt.ids,
        query_tokens=None if ask.query is None else query,
        scorer=ask.scorer,
        chunk_tokens=CHUNK_TOKENS,
        pool_kernel=ask.pool_kernel,
        last_token_query=ask.last_token_query,
        lookahead_tokens=ask.lookahead_tokens,
        seed=ask.seed,
        attention=ask.attention,
    )
    scores = drafter.backend.score(request, stop=stop or threading.Event(), progress=progress)
    scored_s = time.monotonic()
    sizes = chunk_sizes(prompt.ids.size, CHUNK_TOKENS)
    forced = forced_chunks(sizes, ask.selection, _forced_tokens(prompt, ask, query))
    selection = select(scores.scores, scores.panel, forced, sizes, ask.selection)
    spans = kept_spans(selection.kept, prompt.ends, CHUNK_TOKENS, prompt.text)
    return Skimmed(
        spans,
        selection,
        scores,
        prompt_tokens=prompt.ids.size,
        forward_s=scored_s - begin_s - scores.memory_s,
        select_s=time.monotonic() - scored_s,
    )


def _query_tokens(prompt: Prompt, ask: Ask) -> tuple[int, int]:
    """The tokens that ask: those of `query`, else all of the prompt."""
    if ask.query is None:
        return 0, prompt.ids.size
    begin, end = token_ranges(prompt.ends, [round_outward(ask.query, prompt.text)])[0]
    return int(begin), int(end)


def _forced_tokens(prompt: Prompt, ask: Ask, query: tuple[int, int]) -> NDArray[np.int64]:
    """Token ranges that are kept whatever their score: protected ones and the query's tail."""
    rounded = [round_outward(span, prompt.text) for span in ask.protected]
    tail = max(query[0], query[1] - ask.protect_tail_tokens), query[1]
    return np.concatenate((token_ranges(prompt.ends, rounded), np.array([tail], np.int64)))
