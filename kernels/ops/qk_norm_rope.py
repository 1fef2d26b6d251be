"""Bias, per-head norm and rotary positions of the projected heads, in place.

The angles need no tables of cosines: `frequency_turns` turns the frequencies of
`kernels.reference.rope` into fixed-point turns, with which the kernel is exact at any position.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kernels.device import Device
from kernels.ops.checks import ROW_MULTIPLE, check, check_aligned, check_multiple, check_positive
from kernels.specialisation import Family

QK_NORM_ROPE = Family("qk_norm_rope.cu", "qk_norm_rope", HEAD_DIM=(64, 128, 256))

THREADS = 256
LANE_COMPONENTS = 16  # of a head in one thread


def frequency_turns(frequencies: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Express radians per position as turns per position, in units of 2^-64 turn.

    The fraction of a turn at a position is then a product of integers modulo 2^64. Only whole turns
    are lost, and to the frequency's own float64 it adds 2^-65 turn.

    Args:
        frequencies: [head_dim / 2] radians per position, not negative (`rope_frequencies`).
    Returns:
        uint64 [head_dim / 2], what `qk_norm_rope` takes.
    """
    turns = frequencies / (2.0 * math.pi) % 1.0
    high = np.floor(turns * 2.0**32)
    low = np.rint((turns * 2.0**32 - high) * 2.0**32)  # exact: a float64 has 53 bits
    shifted = high.astype(np.uint64) << np.uint64(32)
    return shifted + low.astype(np.uint64)


def qk_norm_rope(
    device: Device,
    *,
    qkv: int,
    row_stride: int,
    num_rows: int,
    head_dim: int,
    num_q: int,
    num_k: int,
    num_v: int,
    turns: int,
    magnitude: float,
    first_position: int = 0,
    positions: int = 0,
    q_norm: int = 0,
    k_norm: int = 0,
    bias: int = 0,
    epsilon: float = 0.0,
) -> None:
    """Finish the heads of each row: query, key and value heads side by side, any of them absent.

    Args:
        qkv: bf16, rows `row_stride` elements apart; changed in place.
        turns: uint64 [head_dim / 2] of `frequency_turns`.
        magnitude: of the rotation, of `rope_frequencies`.
        first_position: position of row 0; the others follow.
        positions: int32 [num_rows], in place of `first_position`; 0: none.
        q_norm, k_norm: float32 [head_dim]; 0: heads are not normalised.
        bias: float32 [(num_q + num_k + num_v) * head_dim]; 0: none.
        epsilon: of the norms.
    """
    name = "qk_norm_rope"
    check_positive(name, row_stride=row_stride, num_rows=num_rows)
    check(min(num_q, num_k, num_v) >= 0, name, "heads", (num_q, num_k, num_v), "not negative")
    width = (num_q + num_k + num_v) * head_dim
    check(width <= row_stride, name, "row_stride", row_stride, f"at least {width}")
    check(first_position >= 0, name, "first_position", first_position, "not negative")
    check_multiple(name, ROW_MULTIPLE, row_stride=row_stride)
    check_aligned(name, qkv=qkv, turns=turns, q_norm=q_norm, k_norm=k_norm, bias=bias)
    device.launch(
        QK_NORM_ROPE.source(HEAD_DIM=head_dim),
        (-(-num_rows * (head_dim // LANE_COMPONENTS) // THREADS),),
        THREADS,
        (
            qkv,
            turns,
            positions,
            q_norm,
            k_norm,
            bias,
            np.int32(row_stride),
            np.int32(num_rows),
            np.int32(first_position),
            np.int32(num_q),
            np.int32(num_k),
            np.int32(num_v),
            np.float32(epsilon),
            np.float32(magnitude),
        ),
    )
