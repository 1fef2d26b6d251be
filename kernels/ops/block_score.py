"""How much softmax mass each tile of queries would give each block of keys, by the blocks' means.

Runs after `kernels.ops.block_mean`; `kernels.ops.block_select` chooses by what it writes.
"""

from __future__ import annotations

import math

import numpy as np

from kernels.device import Device
from kernels.ops.checks import ROW_MULTIPLE, check, check_aligned, check_multiple, check_positive
from kernels.specialisation import Family, most_shared_bytes

BLOCK_SCORE = Family("block_score.cu", "block_score", HEAD_DIM=(64, 128, 256))

BLOCK_TOKENS = 128
THREADS = 128
MAX_TOKENS = 65_535 * BLOCK_TOKENS  # a grid has at most 65,535 blocks in y


def shared_bytes(head_dim: int, num_blocks: int) -> int:
    """Dynamic shared memory of a block of threads: queries, two stages of means, a row's (m, S)."""
    means = THREADS if head_dim <= 128 else THREADS // 2  # in work at once, 64 columns of each
    return BLOCK_TOKENS * head_dim * 2 + 2 * means * 128 + 8 * num_blocks


def most_blocks(arch: str, head_dim: int) -> int:
    """Blocks of the longest prompt whose rows fit a card's shared memory."""
    return (most_shared_bytes(arch) - shared_bytes(head_dim, 0)) // 8


def block_score(
    device: Device,
    *,
    q: int,
    row_stride: int,
    k_mean: int,
    mass: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
) -> None:
    """Score every block J <= I for every tile I of every query head, in one launch.

    Args:
        q: bf16, rotated; token t in row t, head h at column h * head_dim.
        row_stride: elements from one row of q to the next.
        k_mean: bf16 [num_kv_heads, num_blocks, head_dim].
        mass: float32 [num_heads, num_tiles, num_blocks]; entries J > I are left as they are.
        scale: of the logits, positive.
    """
    name = "block_score"
    check_positive(name, num_tokens=num_tokens, row_stride=row_stride)
    check_positive(name, num_heads=num_heads, num_kv_heads=num_kv_heads)
    check(num_tokens <= MAX_TOKENS, name, "num_tokens", num_tokens, f"at most {MAX_TOKENS}")
    check_multiple(name, num_kv_heads, num_heads=num_heads)
    check_multiple(name, ROW_MULTIPLE, row_stride=row_stride)
    check_aligned(name, q=q, k_mean=k_mean, mass=mass)
    check(math.isfinite(scale) and scale > 0, name, "scale", scale, "positive")
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    device.launch(
        BLOCK_SCORE.source(HEAD_DIM=head_dim),
        (num_heads, num_blocks),
        THREADS,
        (
            q,
            k_mean,
            mass,
            np.int32(row_stride),
            np.int32(num_tokens),
            np.int32(num_blocks),
            np.int32(num_heads // num_kv_heads),
            np.float32(scale * math.log2(math.e)),
        ),
        shared_bytes=shared_bytes(head_dim, num_blocks),
    )
