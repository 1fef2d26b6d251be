"""Predict how long a full prefill takes, from the prefills that this target really ran.

The pipeline feeds it each chunk that ran alone; `Tokenised.full_prefill_estimate_s` and the
gateway's patience with a drafter come from it. Refuses nothing; without a measurement it
predicts nothing.

A token's cost grows with its position, for attention reads all tokens before it: y(x) = a + b x
seconds at position x, so n tokens take a n + b n^2 / 2. Chunks are averaged by octave of their
position first: thousands of short prompts then never outvote the one long prompt that shows b.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# A new chunk moves its octave's mean by a fifth: follows a machine that gets busy within five
# chunks, and one slow chunk does not shake it.
WEIGHT = 0.2
# Shorter chunks tell what a call costs, not what a token costs.
MIN_TOKENS = 128


class PrefillRate:
    """Running estimate of a + b x."""

    def __init__(self) -> None:
        self._octaves: dict[int, tuple[float, float]] = {}  # octave: mean position, mean s/token
        self._line: tuple[float, float] | None = None

    def add(self, begin: int, end: int, seconds: float) -> None:
        """Learn that the tokens [begin, end) of one prompt took `seconds`, nothing else running."""
        if end - begin < MIN_TOKENS or not seconds > 0.0:
            return
        position, cost_s = (begin + end) / 2, seconds / (end - begin)
        octave = int(math.log2(position + 1))
        if octave in self._octaves:
            old_position, old_cost_s = self._octaves[octave]
            position = old_position + WEIGHT * (position - old_position)
            cost_s = old_cost_s + WEIGHT * (cost_s - old_cost_s)
        self._octaves[octave] = (position, cost_s)
        self._line = _fit(list(self._octaves.values()))

    def prefill_s(self, tokens: int) -> float:
        """Predict a full prefill of `tokens`; 0.0 before the first measurement."""
        if self._line is None:
            return 0.0
        a, b = self._line
        return a * tokens + b * tokens * tokens / 2

    def tokens_per_s(self, tokens: int) -> float:
        """Predict the mean rate of a full prefill of `tokens`; 0.0 before the first measurement."""
        seconds = self.prefill_s(tokens)
        return tokens / seconds if seconds > 0.0 else 0.0


class ChunkTimer:
    """Times the chunks of one prefill for a `PrefillRate`.

    Args:
        rate: what learns.
        company: gives a number that stays the same while nothing else runs, None while something
            does; a chunk counts only if nothing came or went beside it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        rate: PrefillRate,
        company: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate, self._company, self._clock = rate, company, clock
        self._tokens, self._at_s, self._seen = 0, clock(), company()

    def at(self, tokens: int) -> None:
        """Note that `tokens` of the prompt are prefilled now; short chunks count together."""
        now_s, company = self._clock(), self._company()
        alone = company is not None and company == self._seen
        if alone and 0 < tokens - self._tokens < MIN_TOKENS:
            return
        if alone:
            self._rate.add(self._tokens, tokens, now_s - self._at_s)
        self._tokens, self._at_s, self._seen = tokens, now_s, company


def _fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Fit y = a + b x with a, b >= 0, least squares of the relative error."""
    weights = [1.0 / (y * y) for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    if spread <= 0.0:  # one octave: it says nothing about growth
        return mean_y, 0.0
    b = (
        sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
        / spread
    )
    if b <= 0.0:
        return mean_y, 0.0
    a = mean_y - b * mean_x
    if a >= 0.0:
        return a, b
    squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
    products = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True))
    return 0.0, products / squares
