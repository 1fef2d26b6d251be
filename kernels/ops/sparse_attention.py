"""Attention over block lists, or dense, with the mean correction: on every card from sm_80 on.

`attention_on` is where a pass comes in: it picks the Hopper kernel (`kernels.ops.attention_sm90`)
where that one exists for the card and the sizes, and the portable kernel elsewhere. Both attend in
place over the same buffers, and both are used alike: made once a pass, launched once a layer.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from kernels.device import Device
from kernels.ops import attention_sm90
from kernels.ops.attention_sm90 import Tensors
from kernels.ops.checks import ROW_MULTIPLE, check, check_aligned, check_multiple, check_positive
from kernels.specialisation import Family

SPARSE_ATTENTION = Family("sparse_attention.cu", "sparse_attention", HEAD_DIM=(64, 128, 256))

BLOCK_TOKENS = 128
MAX_TOKENS = 65_535 * BLOCK_TOKENS  # a grid has at most 65,535 blocks in y
STAGES_BYTES = 32 << 10  # two stages of keys and values, 8 KiB each


class Attention(Protocol):
    """One path, bound to its buffers."""

    def launch(self, *, indices: int, counts: int) -> None:
        """Attend in one launch; the output replaces the queries.

        Args:
            indices: int32 [num_heads, num_tiles, num_blocks], ascending, the diagonal block last;
                0: every causal block.
            counts: int32 [num_heads, num_tiles], at least 1; 0 exactly where `indices` is.
        """
        ...


def attention_on(
    device: Device, tensors: Tensors, *, scratch: int, full_tiles: int, scale: float
) -> Attention:
    """The fastest path for this card and these sizes.

    Args:
        scratch: `attention_sm90.SCRATCH_BYTES`.
        full_tiles: how many of the last tiles have full lists.
        scale: of the logits, positive.
    """
    if attention_sm90.takes(device.arch, tensors.head_dim, tensors.num_tokens):
        return attention_sm90.SparseAttention(
            device, tensors, scratch=scratch, full_tiles=full_tiles, scale=scale
        )
    return SparseAttention(device, tensors, scale=scale)


def shared_bytes(head_dim: int, num_blocks: int) -> int:
    """Dynamic shared memory of a block of threads: queries, stages, a bit for each block."""
    return BLOCK_TOKENS * head_dim * 2 + STAGES_BYTES + 4 * (num_blocks // 32 + 2)


class SparseAttention:
    """The portable kernel over fixed buffers.

    Args:
        device: any.
        tensors: what is attended over.
        scale: of the logits, positive.
    """

    def __init__(self, device: Device, tensors: Tensors, *, scale: float) -> None:
        _check(tensors, scale)
        self._device, self._tensors, self._scale = device, tensors, scale
        self._source = SPARSE_ATTENTION.source(HEAD_DIM=tensors.head_dim)
        self._shared_bytes = shared_bytes(tensors.head_dim, tensors.num_blocks)

    def launch(self, *, indices: int, counts: int) -> None:
        """Attend; see `Attention.launch`."""
        name, tensors = "sparse_attention", self._tensors
        check(bool(indices) == bool(counts), name, "counts", counts, "given with indices")
        check_aligned(name, indices=indices, counts=counts)
        self._device.launch(
            self._source,
            (tensors.num_heads, tensors.num_blocks),
            256 if tensors.head_dim > 128 else 128,
            (
                tensors.q,
                tensors.k,
                tensors.v,
                np.int32(tensors.row_stride),
                tensors.k_mean,
                tensors.v_mean,
                indices,
                counts,
                np.int32(tensors.num_tokens),
                np.int32(tensors.num_blocks),
                np.int32(tensors.num_heads // tensors.num_kv_heads),
                np.float32(self._scale * math.log2(math.e)),
            ),
            shared_bytes=self._shared_bytes,
        )


def _check(tensors: Tensors, scale: float) -> None:
    name = "sparse_attention"
    check_positive(name, num_heads=tensors.num_heads, num_kv_heads=tensors.num_kv_heads)
    check_positive(name, num_tokens=tensors.num_tokens, row_stride=tensors.row_stride)
    tokens = tensors.num_tokens
    check(tokens <= MAX_TOKENS, name, "num_tokens", tokens, f"at most {MAX_TOKENS}")
    check_multiple(name, tensors.num_kv_heads, num_heads=tensors.num_heads)
    check_multiple(name, ROW_MULTIPLE, row_stride=tensors.row_stride)
    widest = tensors.num_heads * tensors.head_dim
    check(tensors.row_stride >= widest, name, "row_stride", tensors.row_stride, f">= {widest}")
    check_aligned(name, q=tensors.q, k=tensors.k, v=tensors.v)
    check_aligned(name, k_mean=tensors.k_mean, v_mean=tensors.v_mean)
    together = bool(tensors.k_mean) == bool(tensors.v_mean)
    check(together, name, "v_mean", tensors.v_mean, "given with k_mean")
    check(math.isfinite(scale) and scale > 0, name, "scale", scale, "positive")
