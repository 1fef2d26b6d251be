"""Mean key (or value) of each block of 128 positions: what a pruned block is stood for by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.reference.rounding import round_to_bf16


def block_mean(values: NDArray[np.float32], block_tokens: int) -> NDArray[np.float32]:
    """Average over the real tokens of each block in float32, then round to bf16.

    Args:
        values: [num_kv_heads, num_tokens, head_dim]; the last block may be short.
        block_tokens: positions per block.
    Returns:
        [num_kv_heads, num_blocks, head_dim], float32 holding bf16 values.
    """
    heads, num_tokens, head_dim = values.shape
    whole = num_tokens // block_tokens
    body = values[:, : whole * block_tokens].reshape(heads, whole, block_tokens, head_dim)
    means = body.mean(axis=2, dtype=np.float32)
    if whole * block_tokens < num_tokens:
        tail = values[:, whole * block_tokens :].mean(axis=1, dtype=np.float32, keepdims=True)
        means = np.concatenate([means, tail], axis=1)
    return round_to_bf16(means)
