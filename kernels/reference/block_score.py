"""How much softmax mass each query tile would give each key block, judged by the block's mean key.

Two steps, as in the kernel: the tile's own maximum and sum per block, then the rescale that makes
blocks of one row comparable. Dividing a row by its sum would change nothing; leaving the rescale
out changes everything (a uniform block would beat a strong one).

Source: FlashPrefill (arXiv:2603.06199), block scores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def block_score(
    q: NDArray[np.float32], k_mean: NDArray[np.float32], *, block_tokens: int, scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score block J for tile I over the tile's positions i >= the last token of J.

    With s_i = scale * q_i . k_mean_J: maximum m_IJ = max s_i, sum S_IJ = sum exp(s_i - m_IJ).
    So every position of the tile counts for J < I, and only its last one for J = I.

    Args:
        q: [num_heads, num_tokens, head_dim].
        k_mean: [num_kv_heads, num_blocks, head_dim].
    Returns:
        (maxima, sums), both float64 [num_heads, num_tiles, num_blocks]; for J > I (-inf, 0).
    """
    num_heads, num_tokens, _ = q.shape
    num_kv_heads, num_blocks, _ = k_mean.shape
    group = num_heads // num_kv_heads
    maxima = np.full((num_heads, num_blocks, num_blocks), -np.inf)
    sums = np.zeros((num_heads, num_blocks, num_blocks))
    last_token = np.minimum(np.arange(1, num_blocks + 1) * block_tokens, num_tokens) - 1
    for head in range(num_heads):
        keys = k_mean[head // group].astype(np.float64)
        for tile in range(num_blocks):
            rows = np.arange(tile * block_tokens, min((tile + 1) * block_tokens, num_tokens))
            scores = scale * (q[head, rows].astype(np.float64) @ keys[: tile + 1].T)
            scores[rows[:, None] < last_token[None, : tile + 1]] = -np.inf
            largest = scores.max(axis=0)
            maxima[head, tile, : tile + 1] = largest
            sums[head, tile, : tile + 1] = np.exp(scores - largest).sum(axis=0)
    return maxima, sums


def block_mass(maxima: NDArray[np.float64], sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rescale the sums of a row to its largest maximum: P_IJ = S_IJ exp(m_IJ - max_J m_IJ)."""
    return np.asarray(sums * np.exp(maxima - maxima.max(axis=-1, keepdims=True)))
