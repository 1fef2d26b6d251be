"""How many tokens the next prefill chunk takes.

A chunk is the grain of cancellation and of fairness. A CPU decode can be aborted inside, so there
the largest chunk is best; a GPU decode cannot, so it is kept short enough for a lost client to free
its sequence within a second. Pure.
"""

from __future__ import annotations

SLOW_S = 0.8  # a second from a lost client to the freed sequence, less the way there
FAST_S = 0.2  # doubling from here stays under SLOW_S, the quadratic part included
SMALLEST = 256  # below it a GPU's GEMMs no longer fill the device


class ChunkPacer:
    """Halves the chunk when the last one was slow, and doubles it back when it was fast.

    Args:
        largest: tokens of a full chunk.
        adaptive: False where a decode can be aborted inside: always `largest`.
    """

    def __init__(self, largest: int, *, adaptive: bool) -> None:
        self._largest = largest
        self._adaptive = adaptive
        self.tokens = largest

    def took(self, tokens: int, elapsed_s: float) -> None:
        """Learn from a chunk of `tokens`; a last, shorter one says nothing about a full one."""
        if not self._adaptive or tokens < self.tokens:
            return
        if elapsed_s > SLOW_S:
            self.tokens = max(min(SMALLEST, self._largest), self.tokens // 2)
        elif elapsed_s < FAST_S:
            self.tokens = min(self._largest, self.tokens * 2)
