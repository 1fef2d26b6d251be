"""Intervals for shares, and for the difference of two paired shares."""

from __future__ import annotations

import math

Z95 = 1.959964


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of hits / n; (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    centre = share + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_difference(first: list[bool], second: list[bool]) -> tuple[float, float, float]:
    """Mean of second - first over pairs, with its 95 % interval (normal, discordant pairs)."""
    n = len(first)
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    mean = (gained - lost) / n
    spread = Z95 * math.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0)) / n
    return mean, mean - spread, mean + spread
