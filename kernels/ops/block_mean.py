"""Mean keys and mean values of every block of 128 tokens, in one launch."""

from __future__ import annotations

import numpy as np

from kernels.device import Device
from kernels.ops.checks import ROW_MULTIPLE, check, check_aligned, check_multiple, check_positive
from kernels.specialisation import Family

BLOCK_MEAN = Family("block_mean.cu", "block_mean")

BLOCK_TOKENS = 128
COLUMNS = 256  # of a block of threads, as in the source
MAX_TOKENS = 65_535 * BLOCK_TOKENS  # a grid has at most 65,535 blocks in y


def block_mean(
    device: Device,
    *,
    k: int,
    v: int,
    row_stride: int,
    k_mean: int,
    v_mean: int,
    num_tokens: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Average over the real tokens of each block.

    Args:
        k, v: bf16, token t in row t, KV head h at column h * head_dim.
        row_stride: elements from one row to the next.
        k_mean, v_mean: bf16 [num_kv_heads, ceil(num_tokens / 128), head_dim].
    """
    check_positive("block_mean", num_tokens=num_tokens, num_kv_heads=num_kv_heads)
    check_positive("block_mean", head_dim=head_dim, row_stride=row_stride)
    check(num_tokens <= MAX_TOKENS, "block_mean", "num_tokens", num_tokens, f"at most {MAX_TOKENS}")
    check_multiple("block_mean", ROW_MULTIPLE, head_dim=head_dim, row_stride=row_stride)
    check_aligned("block_mean", k=k, v=v)
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    width = num_kv_heads * head_dim
    device.launch(
        BLOCK_MEAN.source(),
        (-(-width // COLUMNS), num_blocks, 2),
        COLUMNS,
        (
            k,
            v,
            k_mean,
            v_mean,
            np.int32(row_stride),
            np.int32(num_tokens),
            np.int32(width),
            np.int32(head_dim),
        ),
    )
