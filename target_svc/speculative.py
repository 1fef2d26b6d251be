"""Speculative decoding: who proposes tokens, and which of them are emitted.

Fifth stop of the reading order, after compaction. The engine asks a Drafter for tokens, decodes
[last token, drafts] in one verify batch, and walks its rows with `verify`. Lossless by design: each
emitted token is what the sampler chose from the target's own row; a draft only decides how many
rows of one batch can be used. Pure: NumPy, no llama_cpp, no model.

The n-gram drafter is the ladder's first rung: answers over a document repeat it, and what
compaction dropped is still known here, so it looks in the whole original prompt.
Source: prompt lookup decoding (A. Saxena, 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

import numpy as np

from target_svc.messages import Int32s

# Two tokens in common are the least that says more than a frequent word; five are enough to tell
# most continuations apart, and a longer scan only costs time.
MIN_NGRAM, MAX_NGRAM = 2, 5


class Drafter(Protocol):
    """Proposes continuations of one sequence; one object a request."""

    def propose(self, limit: int) -> Int32s:
        """Give at most `limit` tokens that may follow all tokens extended so far; may be empty."""
        ...

    def extend(self, tokens: Sequence[int]) -> None:
        """Take tokens that were emitted."""
        ...


class NoDrafter:
    """Proposes nothing: plain decoding."""

    def propose(self, limit: int) -> Int32s:
        """Give nothing."""
        return np.zeros(0, np.int32)

    def extend(self, tokens: Sequence[int]) -> None:
        """Ignore what was emitted."""


class NgramDrafter:
    """Continues the longest recent repetition of the last tokens.

    A row of a verify batch is not free (on a CPU 8 rows cost 2 to 4 times one), so after a wrong
    draft it proposes one token more than was right, and twice as many after each right one.

    Args:
        prompt: int32 [n], the whole prompt before compaction.
        capacity: tokens that `extend` may add at most.
    """

    def __init__(self, prompt: Int32s, capacity: int) -> None:
        self._tokens = np.concatenate((prompt, np.zeros(capacity, np.int32)))
        self._count = len(prompt)
        self._proposed: list[int] = []
        self._trust: int | None = None  # tokens to propose at most; None: no bound yet

    def extend(self, tokens: Sequence[int]) -> None:
        """Append emitted tokens, and learn from how many of the last proposal are among them.

        Raises:
            ValueError: more than `capacity` in all.
        """
        self._tokens[self._count : self._count + len(tokens)] = tokens
        self._count += len(tokens)
        drafted, self._proposed = self._proposed, []
        if drafted:
            pairs = zip(drafted, tokens, strict=False)
            right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            self._trust = 2 * len(drafted) if right == len(drafted) else right + 1

    def propose(self, limit: int) -> Int32s:
        """Give what followed the longest match, the latest one among equals."""
        if self._trust is not None:
            limit = min(limit, self._trust)
        draft = self._continuation(limit)
        self._proposed = draft.tolist()
        return draft

    def _continuation(self, limit: int) -> Int32s:
        tokens = self._tokens[: self._count]
        if limit < 1 or self._count <= MIN_NGRAM:
            return np.zeros(0, np.int32)
        # Index one past each earlier occurrence of the last token; its continuation starts there.
        ends = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1
        matched = 1
        while matched < MAX_NGRAM and matched < self._count and len(ends):
            longer = ends[ends > matched]
            longer = longer[tokens[longer - matched - 1] == tokens[-matched - 1]]
            if not len(longer):
                break
            ends, matched = longer, matched + 1
        if matched < MIN_NGRAM or not len(ends):
            return np.zeros(0, np.int32)
        # Near the end the continuation is short: the text repeats itself, and may go on to.
        return np.resize(tokens[int(ends[-1]) :][:limit], limit)


class Verdict(NamedTuple):
    """What one verify batch yields.

    Attributes:
        emitted: tokens in order, at least one; the last one is not in the KV cache yet.
        accepted: how many of them were drafted.
        stopped: whether the last one is a stop token.
    """

    emitted: list[int]
    accepted: int
    stopped: bool


def verify(
    drafts: Sequence[int], choose: Callable[[int], int], stops: Callable[[int], bool]
) -> Verdict:
    """Walk the rows of a verify batch until the target disagrees, stops, or the rows end.

    Row 0 is the last emitted token's, row i is draft i's. Each row is chosen from at most once and
    only when every draft before it was right, so a sampler spends one draw an emitted token and
    gives the same answer with any drafts or none.

    Args:
        drafts: [k] proposed tokens; k + 1 rows exist.
        choose: row index -> token chosen from the target's row.
        stops: whether a token ends the answer.
    """
    emitted: list[int] = []
    while True:
        row = len(emitted)
        token = choose(row)
        emitted.append(token)
        agrees, stopped = row < len(drafts) and token == drafts[row], stops(token)
        if stopped or not agrees:
            return Verdict(emitted, row + agrees, stopped)
