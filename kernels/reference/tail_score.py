"""How strongly a few asking queries look at each prompt token: the scores that selection ranks.

Per layer: exact causal softmax of each query over every prompt key, averaged over 13 neighbours per
row, then the running maximum over heads and layers. Pooling comes before the maximum, so a lone
spike counts a thirteenth wherever it stands. The unpooled mean over heads feeds the coverage panel.

Source: SpecPrefill (arXiv:2502.02789), token importance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def attention_rows(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    positions: NDArray[np.int64],
    *,
    scale: float,
) -> NDArray[np.float32]:
    """Softmax of each query over the keys it may see, in float32.

    Args:
        queries: [num_heads, num_queries, head_dim], rotated.
        keys: [num_kv_heads, num_tokens, head_dim], the prompt's keys only.
        positions: [num_queries]; a query at p sees keys 0..p. A position at or past num_tokens (a
            copied query, a generated token) sees them all.
    Returns:
        [num_heads, num_queries, num_tokens]; every row sums to 1.
    """
    num_heads = queries.shape[0]
    group = num_heads // keys.shape[0]
    num_tokens = keys.shape[1]
    rows = np.empty((num_heads, queries.shape[1], num_tokens), dtype=np.float32)
    hidden = np.arange(num_tokens)[None, :] > positions[:, None]
    for head in range(num_heads):
        np.matmul(queries[head] * np.float32(scale), keys[head // group].T, out=rows[head])
        rows[head][hidden] = -np.inf
    rows -= rows.max(axis=-1, keepdims=True)
    np.exp(rows, out=rows)
    rows /= rows.sum(axis=-1, keepdims=True, dtype=np.float32)
    return rows


def average_pool(rows: NDArray[np.float32], kernel: int) -> NDArray[np.float32]:
    """Average each value with its kernel - 1 neighbours; past the ends counts as zeros."""
    half, num_tokens = kernel // 2, rows.shape[-1]
    # running[..., i] = sum of the first i - half - 1 values, clamped at both ends
    running = np.zeros((*rows.shape[:-1], num_tokens + kernel), dtype=np.float64)
    np.cumsum(rows, axis=-1, dtype=np.float64, out=running[..., half + 1 : half + 1 + num_tokens])
    running[..., half + 1 + num_tokens :] = running[..., half + num_tokens, None]
    return ((running[..., kernel:] - running[..., :-kernel]) / kernel).astype(np.float32)


def tail_score(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    positions: NDArray[np.int64],
    running_max: NDArray[np.float32],
    *,
    scale: float,
    pool_kernel: int,
) -> NDArray[np.float32]:
    """Score one layer: raise `running_max` in place and return the layer's panel rows.

    Args:
        queries, keys, positions: as for `attention_rows`.
        running_max: [num_queries, num_tokens], zeros before the first layer. The token score is its
            mean over the queries after the last layer.
    Returns:
        [num_queries, num_tokens]: mean over heads of the unpooled rows; each row sums to 1.
    """
    num_heads = queries.shape[0]
    group = num_heads // keys.shape[0]
    panel = np.zeros(running_max.shape, dtype=np.float32)
    # One head at a time: the rows of all together would be the pass's largest array.
    for head in range(num_heads):
        own, read = slice(head, head + 1), slice(head // group, head // group + 1)
        rows = attention_rows(queries[own], keys[read], positions, scale=scale)[0]
        np.maximum(running_max, average_pool(rows, pool_kernel), out=running_max)
        panel += rows
    panel /= num_heads
    return panel
