"""How many tokens the next prefill chunk takes.

A chunk is the grain of fairness and, with what the backend allows, of cancellation: a GPU decode
cannot be stopped inside, a CPU decode only between two nodes of its graph, and one attention node
over 2,048 queries at great depth takes seconds. Large chunks are the fastest, so a chunk is halved
only when the last one was deaf for too long. Pure.
"""

from __future__ import annotations

SMALLEST = 256  # below it a GPU's GEMMs no longer fill the device, and a CPU loses a third


class ChunkPacer:
    """Halves the chunk when the last one was deaf for too long, doubles it back when it was not.

    Args:
        largest: tokens of a full chunk.
        deaf_max_s: longest stretch without a look at cancellations; 0: always `largest`.
    """

    def __init__(self, largest: int, deaf_max_s: float) -> None:
        self._largest = largest
        self._deaf_max_s = deaf_max_s
        self.tokens = largest

    def took(self, tokens: int, deaf_s: float) -> None:
        """Learn from a chunk of `tokens` that was deaf for `deaf_s` at a stretch."""
        if not self._deaf_max_s or tokens < self.tokens:
            return  # a last, shorter chunk says nothing about a full one
        if deaf_s > self._deaf_max_s:
            self.tokens = max(min(SMALLEST, self._largest), self.tokens // 2)
        elif deaf_s < self._deaf_max_s / 3:  # twice the tokens, at some depth, take twice as long
            self.tokens = min(self._largest, self.tokens * 2)
