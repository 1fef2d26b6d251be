"""Turn kept spans into what the target prefills: token ids and the positions they carry.

Follows `skim/spans.py` in the reading order; called by the request pipeline once the plan is known.
Pure: arrays in, arrays out. It trusts its spans to be canonical (the wire checked them) and refuses
a prompt without tokens.

Two tokens are kept whatever the spans say:

- The ones that stand before the text (BOS, where the model adds it). They hold no byte, so no span
  can name them, and models are trained never to miss them: attention parks its surplus there.
- The prompt's last token. The first generated token is read off the row of the last prefilled one,
  so without it the model would answer as if the prompt ended wherever the last span does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skim.errors import InvalidRequest
from skim.spans import Span, tokens_overlapping

Int32s = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TokenisedPrompt:
    """The whole prompt in the target's tokens.

    Attributes:
        ids: int32 [n], tokens before the text included.
        ends: int64 [n], end of each token in bytes of the prompt, non-decreasing; token i covers
            [ends[i - 1], ends[i]). Tokens before the text end at byte 0.
        leading: tokens that stand before the text: 1 where the model adds BOS, else 0.
    """

    ids: Int32s
    ends: NDArray[np.int64]
    leading: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt length in tokens."""
        return int(self.ids.size)


@dataclass(frozen=True, eq=False)
class Compacted:
    """What is prefilled.

    Attributes:
        ids: int32 [n], n >= 1, in prompt order.
        positions: int32 [n], strictly increasing.
        next_position: position of the first generated token.
    """

    ids: Int32s
    positions: Int32s
    next_position: int

    @property
    def num_tokens(self) -> int:
        """Tokens to prefill."""
        return int(self.ids.size)


def kept_ranges(prompt: TokenisedPrompt, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """List the half-open ranges of token indices to keep, sorted, disjoint, never touching."""
    ranges = tokens_overlapping(prompt.ends.tolist(), spans)
    last = prompt.num_tokens
    joined: list[tuple[int, int]] = []
    for first, end in [(0, prompt.leading), *ranges, (last - 1, last)]:
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif first < end:
            joined.append((first, end))
    return joined


def compact(prompt: TokenisedPrompt, spans: Sequence[Span], *, original: bool) -> Compacted:
    """Gather the tokens that overlap a span by at least one byte, and give them positions.

    Args:
        prompt: the whole prompt.
        spans: canonical spans of the same prompt; `[Span(0, size)]` keeps all of it.
        original: True: the positions that the tokens have in the whole prompt, and generation goes
            on from its end (the model's rope must allow gaps); False: 0, 1, 2, ... without gaps.
    Raises:
        InvalidRequest: the prompt has no token.
    Source: speculative prefill (arXiv:2502.02789) keeps original positions; llama.cpp accepts the
        gaps for models with multimodal rope only, hence the choice.
    """
    if prompt.num_tokens == 0:
        raise InvalidRequest("the prompt is empty", field="prompt", got="0 tokens", allowed=">= 1")
    ranges = kept_ranges(prompt, spans)
    indices = np.concatenate([np.arange(first, end, dtype=np.int32) for first, end in ranges])
    ids = np.ascontiguousarray(prompt.ids[indices], dtype=np.int32)
    if original:
        return Compacted(ids, indices, prompt.num_tokens)
    return Compacted(ids, np.arange(ids.size, dtype=np.int32), int(ids.size))
