"""Reduce a value per token to a value per chunk of 32 tokens: means for scores, sums for mass.

The last chunk may be short; its mean is over its real tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def chunk_sum(values: NDArray[np.floating], chunk_tokens: int) -> NDArray[np.float32]:
    """Sum each chunk along the last axis in float64: [..., num_tokens] to [..., num_chunks]."""
    starts = np.arange(0, values.shape[-1], chunk_tokens)
    sums = np.add.reduceat(values, starts, axis=-1, dtype=np.float64)
    return np.asarray(sums, dtype=np.float32)


def chunk_mean(values: NDArray[np.floating], chunk_tokens: int) -> NDArray[np.float32]:
    """Average each chunk along the last axis: [..., num_tokens] to [..., num_chunks]."""
    starts = np.arange(0, values.shape[-1], chunk_tokens)
    sizes = np.minimum(chunk_tokens, values.shape[-1] - starts)
    sums = np.add.reduceat(values, starts, axis=-1, dtype=np.float64)
    return np.asarray(sums / sizes, dtype=np.float32)
