"""How fast the drafter's passes are, measured on the last few of them.

Kept by the queue, for its retry hints and refusals and for `GetDrafter`. Pure arithmetic.
"""

from __future__ import annotations

from collections import deque

RATE_PASSES = 8  # recent enough to follow a change of load, enough to even out prompt lengths
# Under this a pass's fixed cost shows, and its rate says nothing about a long prompt.
RATE_MIN_TOKENS = 2_048


class PassRate:
    """Tokens per second of the last passes."""

    def __init__(self) -> None:
        self._passes: deque[tuple[int, float]] = deque(maxlen=RATE_PASSES)

    def add(self, tokens: int, seconds: float) -> None:
        """Count a finished pass."""
        if tokens > 0 and seconds > 0.0:
            self._passes.append((tokens, seconds))

    @property
    def mean(self) -> float:
        """All tokens over all seconds; 0.0: nothing measured yet."""
        seconds = sum(seconds for _, seconds in self._passes)
        return sum(tokens for tokens, _ in self._passes) / seconds if seconds else 0.0

    @property
    def best(self) -> float:
        """The fastest pass over a prompt of some length; 0.0: none yet."""
        rates = (tokens / seconds for tokens, seconds in self._passes if tokens >= RATE_MIN_TOKENS)
        return max(rates, default=0.0)
