"""Block-sparse and dense attention on Hopper (wgmma, TMA), with the mean correction.

The Hopper path beside the portable `kernels.ops.sparse_attention`: the same mathematics, lists and
buffers. It refuses other architectures and lists too long for shared memory; whoever dispatches
asks `takes` first.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np

from kernels.device import Arg, Device, KernelSource, TensorMap
from kernels.ops.checks import check, check_aligned, check_multiple, check_positive
from kernels.specialisation import HOPPER, Family

ENTRY = "sparse_attention_sm90"
BLOCK_TOKENS = 128
THREADS = 384
SHARED_LIMIT = 227 << 10  # of a block on Hopper
SCRATCH_BYTES = 4  # the counter of items handed out
PANEL_COLUMNS = 64  # of a tensor map's box: the 128 bytes of the swizzle
MAX_TOKENS = (1 << 31) - BLOCK_TOKENS


@dataclass(frozen=True)
class Tuning:
    """The knobs of the kernel; no choice changes more than the last bits of the result.

    Attributes:
        key_tile: keys of a step, 64 or 128.
        stages: tiles of K, and of V, in flight.
        query_slots: items in flight.
        ping_pong: 1: the two computing warpgroups take turns at the tensor cores.
        persistent: 1: a block a multiprocessor, which draws items; 0: a block an item.
    """

    key_tile: int = 128
    stages: int = 2
    query_slots: int = 2
    ping_pong: int = 1
    persistent: int = 1

    def shared_bytes(self, head_dim: int, num_tokens: int) -> int:
        """Dynamic shared memory of a block, as laid out in attention_sm90.cuh."""
        rows = self.query_slots * BLOCK_TOKENS + 2 * self.stages * self.key_tile
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        means = -(-num_blocks // self.key_tile) * self.key_tile
        return rows * head_dim * 2 + self.query_slots * (16 + 4 * means) + 256

    def family(self, head_dim: int) -> Family:
        """The kernel with these knobs."""
        names = ("KEY_TILE", "STAGES", "QUERY_SLOTS", "PING_PONG", "PERSISTENT")
        values = {name: (value,) for name, value in zip(names, astuple(self), strict=True)}
        return Family("attention_sm90.cu", ENTRY, archs=HOPPER, HEAD_DIM=(head_dim,), **values)

    def source(self, head_dim: int) -> KernelSource:
        """The one variant of that family."""
        return self.family(head_dim).sources()[0]


# A tile takes 16 KiB at 64 columns and 32 at 128; at 256 only half tiles leave room for two stages.
# Taking turns pays where a tile's exponentials take long beside its products; at 256 they do not.
TUNINGS = {
    64: Tuning(stages=4),
    128: Tuning(),
    256: Tuning(key_tile=64, query_slots=1, ping_pong=0),
}
HEAD_64, HEAD_128, HEAD_256 = (tuning.family(head_dim) for head_dim, tuning in TUNINGS.items())


@dataclass(frozen=True)
class Tensors:
    """What one layer attends over, in device memory; the same addresses serve every layer.

    Attributes:
        q: bf16 columns, query head h at column h * head_dim; the output replaces it.
        k, v: bf16 columns, KV head h at column h * head_dim.
        row_stride: elements from one token to the next, of all three.
        k_mean, v_mean: bf16 [num_kv_heads, num_blocks, head_dim], or both 0: no correction.
        num_tokens, num_heads, num_kv_heads, head_dim: sizes.
    """

    q: int
    k: int
    v: int
    row_stride: int
    k_mean: int
    v_mean: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_blocks(self) -> int:
        """Blocks of keys, which is also tiles of queries."""
        return -(-self.num_tokens // BLOCK_TOKENS)


def takes(arch: str, head_dim: int, num_tokens: int) -> bool:
    """Whether this path exists for a device and sizes; the portable kernel serves the rest."""
    tuning = TUNINGS.get(head_dim)
    return (
        arch in HOPPER
        and tuning is not None
        and tuning.shared_bytes(head_dim, num_tokens) <= SHARED_LIMIT
    )


class SparseAttention:
    """The kernel over fixed buffers; makes its tensor maps once.

    Args:
        device: a Hopper GPU.
        tensors: what is attended over.
        scratch: `SCRATCH_BYTES`; contents are undefined before and after.
        full_tiles: how many of the last tiles have full lists. They are begun first, since one of
            them takes as long as dozens of others.
        scale: of the logits, positive.
        tuning: other knobs than those of `TUNINGS`; for benchmarks.
    """

    def __init__(
        self,
        device: Device,
        tensors: Tensors,
        *,
        scratch: int,
        full_tiles: int,
        scale: float,
        tuning: Tuning | None = None,
    ) -> None:
        _check(device, tensors, scratch, full_tiles, scale)
        self._device, self._tensors, self._scratch = device, tensors, scratch
        self._full_tiles = min(full_tiles, tensors.num_blocks)
        self._scale = scale
        self._tuning = tuning or TUNINGS[tensors.head_dim]
        self._shared_bytes = self._tuning.shared_bytes(tensors.head_dim, tensors.num_tokens)
        fits = self._shared_bytes <= SHARED_LIMIT
        check(fits, ENTRY, "shared memory", self._shared_bytes, f"at most {SHARED_LIMIT} bytes")
        self._source = self._tuning.source(tensors.head_dim)
        self._maps = _maps(device, tensors, self._tuning.key_tile)

    def launch(self, *, indices: int, counts: int) -> None:
        """Attend in one launch.

        Args:
            indices: int32 [num_heads, num_tiles, num_blocks], ascending, the diagonal block last;
                0: every causal block.
            counts: int32 [num_heads, num_tiles], at least 1; 0 exactly where `indices` is.
        """
        check(bool(indices) == bool(counts), ENTRY, "counts", counts, "given with indices")
        tensors = self._tensors
        blocks = tensors.num_heads * tensors.num_blocks
        if self._tuning.persistent:
            blocks = min(blocks, self._device.num_sms)
            self._device.fill(self._scratch, SCRATCH_BYTES)
        args: tuple[Arg, ...] = (
            *self._maps,
            tensors.q,
            tensors.row_stride,
            indices,
            counts,
            self._scratch,
            np.int32(tensors.num_tokens),
            np.int32(tensors.num_heads),
            np.int32(tensors.num_kv_heads),
            np.int32(self._full_tiles if indices else 0),
            np.int32(bool(indices and tensors.k_mean)),
            np.float32(self._scale),
        )
        self._device.launch(self._source, (blocks,), THREADS, args, shared_bytes=self._shared_bytes)


def _check(device: Device, tensors: Tensors, scratch: int, full_tiles: int, scale: float) -> None:
    check(device.arch in HOPPER, ENTRY, "the architecture", device.arch, " or ".join(HOPPER))
    check(
        tensors.head_dim in TUNINGS, ENTRY, "head_dim", tensors.head_dim, f"one of {list(TUNINGS)}"
    )
    check_positive(ENTRY, num_heads=tensors.num_heads, num_kv_heads=tensors.num_kv_heads)
    check_positive(ENTRY, num_tokens=tensors.num_tokens, row_stride=tensors.row_stride)
    tokens = tensors.num_tokens
    check(tokens <= MAX_TOKENS, ENTRY, "num_tokens", tokens, f"at most {MAX_TOKENS}")
    check_multiple(ENTRY, tensors.num_kv_heads, num_heads=tensors.num_heads)
    check_multiple(ENTRY, 8, row_stride=tensors.row_stride)
    widest = tensors.num_heads * tensors.head_dim
    check(tensors.row_stride >= widest, ENTRY, "row_stride", tensors.row_stride, f">= {widest}")
    check_aligned(ENTRY, q=tensors.q, k=tensors.k, v=tensors.v)
    check_aligned(ENTRY, k_mean=tensors.k_mean, v_mean=tensors.v_mean)
    together = bool(tensors.k_mean) == bool(tensors.v_mean)
    check(together, ENTRY, "v_mean", tensors.v_mean, "given with k_mean")
    check(scratch > 0 and scratch % 4 == 0, ENTRY, "scratch", scratch, "4-byte aligned")
    check(full_tiles >= 0, ENTRY, "full_tiles", full_tiles, "at least 0")
    check(math.isfinite(scale) and scale > 0, ENTRY, "scale", scale, "positive")


def _maps(device: Device, tensors: Tensors, key_tile: int) -> tuple[TensorMap, ...]:
    """Maps of q, k, v, k_mean, v_mean; without means K's and V's stand in, never read."""
    stride_bytes = 2 * tensors.row_stride
    width = tensors.num_kv_heads * tensors.head_dim
    q = device.tensor_map(
        tensors.q,
        (tensors.num_tokens, tensors.num_heads * tensors.head_dim),
        stride_bytes,
        (BLOCK_TOKENS, PANEL_COLUMNS),
    )
    box = (key_tile, PANEL_COLUMNS)
    k, v = (
        device.tensor_map(address, (tensors.num_tokens, width), stride_bytes, box)
        for address in (tensors.k, tensors.v)
    )
    if not tensors.k_mean:
        return q, k, v, k, v
    means = (tensors.num_kv_heads * tensors.num_blocks, tensors.head_dim)
    return (
        q,
        k,
        v,
        *(
            device.tensor_map(address, means, 2 * tensors.head_dim, box)
            for address in (tensors.k_mean, tensors.v_mean)
        ),
    )
