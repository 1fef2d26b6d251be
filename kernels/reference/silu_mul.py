"""The gate of a SwiGLU feed-forward: silu(gate) * up, elementwise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def silu_mul(gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute gate / (1 + exp(-gate)) * up. A gate far below zero gives (-)0, never NaN."""
    with np.errstate(over="ignore"):  # exp(-gate) = inf is the right limit: the result is 0
        denominator = np.negative(gate)
        np.exp(denominator, out=denominator)
    denominator += 1.0
    np.divide(gate, denominator, out=denominator)
    denominator *= up
    return denominator
