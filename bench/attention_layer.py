"""One layer's attention by itself, on random data: what `bench.attention` times.

Rows are drawn for `POOL_TOKENS` tokens and repeated; the work does not depend on what they hold,
but it is never zeros, which run faster. Attention writes over its queries, so they are put back
before each timed launch: by a product with the identity, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels.device import Device, Memory
from kernels.ops import attention_sm90, sparse_attention
from kernels.ops.attention_sm90 import SCRATCH_BYTES, Tensors, Tuning
from kernels.ops.block_mean import block_mean
from kernels.ops.block_score import block_score
from kernels.ops.block_select import block_select
from kernels.reference import BlockLists, BlockRule

BLOCK = 128
BF16 = 2  # bytes
POOL_TOKENS = 16_384
PATHS = ("hopper", "portable")


@dataclass(frozen=True)
class Shape:
    """Heads of the layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def listed_flops(shape: Shape, num_tokens: int, lists: BlockLists | None) -> float:
    """Operations of two products over the listed pairs: half of a diagonal block, no means."""
    num_tiles = -(-num_tokens // BLOCK)
    sizes = np.full(num_tiles, BLOCK, dtype=np.int64)
    sizes[-1] = num_tokens - (num_tiles - 1) * BLOCK
    if lists is None:
        whole = np.tile(np.arange(num_tiles), (shape.num_heads, 1))
    else:
        whole = lists.counts.astype(np.int64) - 1
    pairs = (whole * sizes * BLOCK).sum() + shape.num_heads * (sizes * (sizes + 1) // 2).sum()
    return 4.0 * shape.head_dim * float(pairs)


class Layer:
    """The device memory of one layer; close it before the next.

    Args:
        seed: of queries, keys and values, all of unit scale, so that logits are too.
    """

    def __init__(self, device: Device, shape: Shape, num_tokens: int, *, seed: int = 0) -> None:
        self.device, self.shape, self.num_tokens = device, shape, num_tokens
        self.num_tiles = -(-num_tokens // BLOCK)
        self._memories: list[Memory] = []
        self._q_width = shape.num_heads * shape.head_dim
        self._kv_width = shape.num_kv_heads * shape.head_dim
        self._width = self._q_width + 2 * self._kv_width
        self._q = self._take(num_tokens * self._width * BF16)
        self._q_before = self._take(num_tokens * self._q_width * BF16)
        self._identity = self._take(self._q_width**2 * BF16)
        means = shape.num_kv_heads * self.num_tiles * shape.head_dim * BF16
        self._k_mean, self._v_mean = self._take(means), self._take(means)
        rows = shape.num_heads * self.num_tiles
        self._mass = self._take(4 * rows * self.num_tiles)
        self._indices = self._take(4 * rows * self.num_tiles)
        self._counts, self._cut = self._take(4 * rows), self._take(rows)
        self._scratch = self._take(SCRATCH_BYTES)
        self._draw(seed)
        self.means()

    def _take(self, num_bytes: int) -> int:
        self._memories.append(self.device.allocate(num_bytes))
        return self._memories[-1].address

    def _draw(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        pool = min(POOL_TOKENS, self.num_tokens)
        drawn = rng.standard_normal((pool, self._width), dtype=np.float32)
        raw = (drawn.view(np.uint32) >> 16).astype(np.uint16)
        queries = np.ascontiguousarray(raw[:, : self._q_width])
        for begin in range(0, self.num_tokens, pool):
            size = min(pool, self.num_tokens - begin)
            self.device.upload(self._q + begin * self._width * BF16, raw[:size])
            self.device.upload(self._q_before + begin * self._q_width * BF16, queries[:size])
        one = np.uint16(0x3F80)  # bf16 1.0
        self.device.upload(self._identity, np.eye(self._q_width, dtype=np.uint16) * one)

    @property
    def _k(self) -> int:
        return self._q + BF16 * self._q_width

    @property
    def _scale(self) -> float:
        return 1.0 / math.sqrt(self.shape.head_dim)

    def restore(self) -> None:
        """Put the queries back over the output."""
        self.device.gemm(
            x=self._q_before,
            w=self._identity,
            y=self._q,
            m=self.num_tokens,
            n=self._q_width,
            k=self._q_width,
            ldx=self._q_width,
            ldy=self._width,
        )

    def means(self) -> None:
        """Means of every block."""
        block_mean(
            self.device,
            k=self._k,
            v=self._k + BF16 * self._kv_width,
            row_stride=self._width,
            k_mean=self._k_mean,
            v_mean=self._v_mean,
            num_tokens=self.num_tokens,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
        )

    def scores(self) -> None:
        """Mass of every block for every tile."""
        block_score(
            self.device,
            q=self._q,
            row_stride=self._width,
            k_mean=self._k_mean,
            mass=self._mass,
            num_tokens=self.num_tokens,
            num_heads=self.shape.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            scale=self._scale,
        )

    def select(self, rule: BlockRule) -> None:
        """Lists by the masses; `plant` overwrites them."""
        block_select(
            self.device,
            mass=self._mass,
            indices=self._indices,
            counts=self._counts,
            cut=self._cut,
            num_heads=self.shape.num_heads,
            num_blocks=self.num_tiles,
            rule=rule,
        )

    def plant(self, lists: BlockLists) -> None:
        """Make these the lists that attention reads."""
        self.device.upload(self._indices, lists.indices)
        self.device.upload(self._counts, lists.counts)

    def takes(self, path: str) -> bool:
        """Whether a path exists on this device for these sizes."""
        if path == "portable":
            return True
        return attention_sm90.takes(self.device.arch, self.shape.head_dim, self.num_tokens)

    def attention(
        self, path: str, *, dense: bool, full_tiles: int, tuning: Tuning | None = None
    ) -> Callable[[], None]:
        """One launch over the planted lists, with the correction, or over every causal block."""
        shape = self.shape
        tensors = Tensors(
            q=self._q,
            k=self._k,
            v=self._k + BF16 * self._kv_width,
            row_stride=self._width,
            k_mean=self._k_mean,
            v_mean=self._v_mean,
            num_tokens=self.num_tokens,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )
        made: sparse_attention.Attention
        if path == "portable":
            made = sparse_attention.SparseAttention(self.device, tensors, scale=self._scale)
        else:
            made = attention_sm90.SparseAttention(
                self.device,
                tensors,
                scratch=self._scratch,
                full_tiles=full_tiles,
                scale=self._scale,
                tuning=tuning,
            )
        indices, counts = (0, 0) if dense else (self._indices, self._counts)
        return lambda: made.launch(indices=indices, counts=counts)

    def output(self, tokens: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """What attention wrote for the last tokens: float32 [tokens, num_heads * head_dim]."""
        rows = np.empty((min(tokens, self.num_tokens), self._width), dtype=np.uint16)
        begin = self.num_tokens - rows.shape[0]
        self.device.download(self._q + begin * self._width * BF16, rows)
        wide = rows[:, : self._q_width].astype(np.uint32) << 16
        return np.ascontiguousarray(wide).view(np.float32)

    def close(self) -> None:
        """Give the memory back."""
        self.device.synchronize()
        while self._memories:
            self._memories.pop().close()
