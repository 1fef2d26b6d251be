"""Causal attention over a list of key blocks per tile, pruned blocks stood for by their means.

A pruned block J < I is fully visible to tile I and adds |B_J| exp(scale q . k_mean_J) (v_mean_J, 1)
to the softmax's numerator and denominator. Listed blocks are exact; the diagonal one is causal
within itself. With every causal block listed this is dense attention.

Source: FlashPrefill V2 (arXiv:2608.19758), mean correction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.reference.block_select import BlockLists


def sparse_attention(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    lists: BlockLists,
    *,
    block_tokens: int,
    scale: float,
    k_mean: NDArray[np.float32] | None = None,
    v_mean: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """Attend in float64.

    Args:
        q: [num_heads, num_tokens, head_dim]; k, v: [num_kv_heads, num_tokens, head_dim].
        lists: blocks per (head, tile); the diagonal block must be among them.
        k_mean, v_mean: [num_kv_heads, num_blocks, head_dim]; both None: no correction.
    Returns:
        float64 [num_heads, num_tokens, head_dim].
    """
    num_heads, num_tokens, _ = q.shape
    group = num_heads // k.shape[0]
    out = np.zeros(q.shape)
    for head in range(num_heads):
        keys, values = k[head // group].astype(np.float64), v[head // group].astype(np.float64)
        for tile in range(lists.counts.shape[1]):
            begin, end = tile * block_tokens, min((tile + 1) * block_tokens, num_tokens)
            listed = lists.row(head, tile)
            columns = np.concatenate(
                [np.arange(j * block_tokens, min((j + 1) * block_tokens, end)) for j in listed]
            )
            queries = q[head, begin:end].astype(np.float64)
            scores = scale * (queries @ keys[columns].T)
            scores[np.arange(begin, end)[:, None] < columns[None, :]] = -np.inf
            read = values[columns]
            if k_mean is not None and v_mean is not None:
                pruned = np.setdiff1d(np.arange(tile), listed)
                means = k_mean[head // group, pruned].astype(np.float64)
                # Blocks before the diagonal are whole: |B_J| = block_tokens.
                stand_in = scale * (queries @ means.T) + np.log(block_tokens)
                scores = np.concatenate([scores, stand_in], axis=1)
                read = np.concatenate([read, v_mean[head // group, pruned]], axis=0)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[head, begin:end] = weights @ read / weights.sum(axis=1, keepdims=True)
    return out


def dense_attention(
    q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32], *, scale: float
) -> NDArray[np.float64]:
    """Attend causally to every key in float64, with no blocks at all; shapes as above."""
    num_heads, num_tokens, _ = q.shape
    group = num_heads // k.shape[0]
    out = np.zeros(q.shape)
    future = np.triu(np.ones((num_tokens, num_tokens), dtype=np.bool_), 1)
    for head in range(num_heads):
        scores = scale * (q[head].astype(np.float64) @ k[head // group].astype(np.float64).T)
        scores[future] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[head] = weights @ v[head // group] / weights.sum(axis=1, keepdims=True)
    return out
