"""Inputs of the attention tests: unit-scale logits, block structure so that selection has work.

Each block of keys is 2 x a centre of its own + unit noise, each tile of queries looks at two of the
earlier centres, so that some blocks matter, most do not, and no two are alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def structured_qkv(
    num_tokens: int,
    *,
    seed: int,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_tokens: int = 128,
) -> tuple[Array, Array, Array]:
    """Give q [num_heads, ...], k and v [num_kv_heads, num_tokens, head_dim]."""
    rng = np.random.default_rng(seed)
    num_blocks = -(-num_tokens // block_tokens)
    block_of = np.arange(num_tokens) // block_tokens
    centres = rng.standard_normal((num_kv_heads, num_blocks, head_dim))
    centres /= np.linalg.norm(centres, axis=-1, keepdims=True) / head_dim**0.25
    k = 2 * centres[:, block_of] + rng.standard_normal((num_kv_heads, num_tokens, head_dim))
    v = rng.standard_normal((num_kv_heads, num_tokens, head_dim)) + centres[:, block_of]
    q = np.empty((num_heads, num_tokens, head_dim))
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        liked = rng.integers(0, np.arange(1, num_blocks + 1)[:, None], (num_blocks, 2))
        aim = centres[kv_head, liked].sum(axis=1)
        q[head] = 2 * aim[block_of] + rng.standard_normal((num_tokens, head_dim))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)
