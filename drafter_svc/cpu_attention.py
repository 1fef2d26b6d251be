"""One layer's block-sparse attention on the CPU: a 128-query tile at a time over its own blocks.

The quick float32 twin of `kernels/reference` (`block_score`, `block_select`, `sparse_attention`),
held to it by the tests: the same lists, the same values to rounding. A tile of one head is one
piece of work: score the blocks by their means, select, gather, one matrix product for the logits
and one for the values, with the softmax's denominator riding along as a column of ones. The very
logits that scored the blocks stand for the pruned ones, so the correction costs no product.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from drafter_svc.backend import AttentionConfig
from drafter_svc.cpu_pool import WorkPool
from kernels.reference import BlockRule, block_mean, select_row

# Blocks attended at once: 16 x 128 keys x 128 queries of float32 are 1 MiB of logits, which stays
# in the second-level cache; longer lists run as several pieces under one running maximum.
PIECE_BLOCKS = 16


class LayerBuffers:
    """Queries, keys and values of one layer, reused by the next.

    Attributes:
        q: float32 [num_heads, num_tokens, head_dim], already times the softmax scale.
        k: float32 [num_kv_heads, num_blocks, block_tokens, head_dim], zeros past the end.
        v: float32 [num_kv_heads, num_blocks, block_tokens, head_dim + 1]; the last column is 1.
        out: float32 [num_tokens, num_heads * head_dim].
    """

    def __init__(
        self, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, block_tokens: int
    ) -> None:
        num_blocks = -(-num_tokens // block_tokens)
        self.num_tokens = num_tokens
        self.q = np.empty((num_heads, num_tokens, head_dim), dtype=np.float32)
        self.k = np.zeros((num_kv_heads, num_blocks, block_tokens, head_dim), dtype=np.float32)
        self.v = np.zeros((num_kv_heads, num_blocks, block_tokens, head_dim + 1), dtype=np.float32)
        self.v[..., head_dim] = 1.0
        self.out = np.empty((num_tokens, num_heads * head_dim), dtype=np.float32)

    def keys(self) -> NDArray[np.float32]:
        """The keys without blocks: [num_kv_heads, num_tokens, head_dim], a view."""
        heads, _, _, head_dim = self.k.shape
        return self.k.reshape(heads, -1, head_dim)[:, : self.num_tokens]

    def values(self) -> NDArray[np.float32]:
        """The values without blocks and without the ones, a view shaped as `keys`."""
        heads, _, _, width = self.v.shape
        return self.v.reshape(heads, -1, width)[:, : self.num_tokens, : width - 1]


class SparseAttention:
    """Attention of every layer of one pass.

    Attributes:
        densities: kept pairs of blocks / causal pairs, one per layer attended so far.
        rows, cut_rows: (layer, head, tile) rows selected, and those that `max_density` cut.
    """

    def __init__(self, buffers: LayerBuffers, config: AttentionConfig, pool: WorkPool) -> None:
        self._buffers = buffers
        self._pool = pool
        self._block_tokens = config.block_tokens
        self._correct = config.mean_correction
        self._rule = BlockRule(
            alpha=config.alpha,
            sink_blocks=config.sink_blocks,
            window_blocks=config.window_blocks,
            last_full_blocks=config.last_full_blocks,
            max_density=config.max_density,
        )
        self._dense = buffers.num_tokens < config.dense_below_tokens
        self._num_heads, _, self._head_dim = buffers.q.shape
        self._num_tiles = buffers.k.shape[1]
        block = config.block_tokens
        # 0 where a key of the diagonal block may be seen, -inf above the diagonal.
        self._causal = np.triu(np.full((block, block), -np.inf, dtype=np.float32), 1)
        self._scratch = [
            _Scratch(block, self._num_tiles, self._head_dim) for _ in range(pool.num_threads)
        ]
        self.densities: list[float] = []
        self.rows = 0
        self.cut_rows = 0

    def run(self, stop: threading.Event) -> None:
        """Attend: read `q`, `k`, `v` of the buffers and write `out`.

        Raises:
            Cancelled: `stop` was set; `out` is unfinished.
        """
        buffers = self._buffers
        self._k_mean = block_mean(buffers.keys(), self._block_tokens)
        ones = np.ones((*self._k_mean.shape[:2], 1), dtype=np.float32)
        self._v_mean = np.concatenate([block_mean(buffers.values(), self._block_tokens), ones], -1)
        self._counts = np.zeros((self._num_heads, self._num_tiles), dtype=np.int64)
        self._cuts = np.zeros((self._num_heads, self._num_tiles), dtype=np.bool_)
        # The last tiles are the longest: they go first, so that no thread is left with one.
        self._pool.run(self._num_heads * self._num_tiles, self._piece, stop)
        causal_pairs = self._num_heads * self._num_tiles * (self._num_tiles + 1) // 2
        self.densities.append(int(self._counts.sum()) / causal_pairs)
        self.rows += self._counts.size
        self.cut_rows += int(self._cuts.sum())

    def _piece(self, piece: int, worker: int) -> None:
        from_end, head = divmod(piece, self._num_heads)
        tile = self._num_tiles - 1 - from_end
        begin = tile * self._block_tokens
        end = min(begin + self._block_tokens, self._buffers.num_tokens)
        q = self._buffers.q[head, begin:end]
        kv_head = head * self._buffers.k.shape[0] // self._num_heads
        scratch = self._scratch[worker]
        blocks, cut, stand_in, pruned = self._select(q, kv_head, tile, scratch)
        self._counts[head, tile], self._cuts[head, tile] = blocks.size, cut
        attended = self._attend(q, kv_head, blocks, stand_in, pruned, scratch)
        columns = slice(head * self._head_dim, (head + 1) * self._head_dim)
        np.divide(attended[:, :-1], attended[:, -1:], out=self._buffers.out[begin:end, columns])

    def _select(
        self, q: NDArray[np.float32], kv_head: int, tile: int, scratch: _Scratch
    ) -> tuple[NDArray[np.int32], bool, NDArray[np.float32] | None, NDArray[np.intp]]:
        """Choose a tile's blocks; give also the logits and indices of those left out."""
        none = np.empty(0, dtype=np.intp)
        if self._dense or tile >= self._num_tiles - self._rule.last_full_blocks:
            return np.arange(tile + 1, dtype=np.int32), False, None, none
        logits = scratch.means[: q.shape[0] * (tile + 1)].reshape(q.shape[0], tile + 1)
        np.matmul(q, self._k_mean[kv_head, : tile + 1].T, out=logits)
        logits[:-1, tile] = -np.inf  # only the last position is past the diagonal block
        # One maximum for the whole row of blocks is the rescale: P_IJ = sum_i exp(s_iJ - max s).
        weights = np.subtract(logits, logits.max())
        np.exp(weights, out=weights)
        mass = np.add.reduce(weights, axis=0)
        blocks, cut = select_row(mass, tile, self._num_tiles, self._rule)
        if not self._correct or blocks.size == tile + 1:
            return blocks, cut, None, none
        left_out = np.ones(tile + 1, dtype=np.bool_)
        left_out[blocks] = False
        pruned = np.flatnonzero(left_out)
        stand_in = logits[:, pruned]
        stand_in += np.float32(np.log(self._block_tokens))
        return blocks, cut, stand_in, pruned

    def _attend(
        self,
        q: NDArray[np.float32],
        kv_head: int,
        blocks: NDArray[np.int32],
        stand_in: NDArray[np.float32] | None,
        pruned: NDArray[np.intp],
        scratch: _Scratch,
    ) -> NDArray[np.float32]:
        """Sum exp(logit - row maximum) (v, 1) over the listed blocks and the stand-ins."""
        total: NDArray[np.float32] | None = None
        peak: NDArray[np.float32] | None = None
        for begin in range(0, blocks.size, PIECE_BLOCKS):
            piece = blocks[begin : begin + PIECE_BLOCKS]
            k, v = self._gather(kv_head, piece, scratch)
            logits = scratch.logits[: q.shape[0] * k.shape[0]].reshape(q.shape[0], -1)
            np.matmul(q, k.T, out=logits)
            if begin + PIECE_BLOCKS >= blocks.size:  # the diagonal block is the last of the list
                logits[:, -self._block_tokens :] += self._causal[: q.shape[0]]
            total, peak = _accumulate(logits, v, total, peak)
        if stand_in is not None:
            total, peak = _accumulate(stand_in, self._v_mean[kv_head, pruned], total, peak)
        assert total is not None  # the diagonal block is always listed
        return total

    def _gather(
        self, kv_head: int, blocks: NDArray[np.int32], scratch: _Scratch
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Bring the listed blocks together: keys and values as [keys, head_dim (+ 1)]."""
        k, v = self._buffers.k[kv_head], self._buffers.v[kv_head]
        first, count = int(blocks[0]), blocks.size
        if int(blocks[-1]) - first + 1 == count:  # a run needs no copy
            k, v = k[first : first + count], v[first : first + count]
        else:
            k = np.take(k, blocks, axis=0, out=scratch.k[:count], mode="clip")
            v = np.take(v, blocks, axis=0, out=scratch.v[:count], mode="clip")
        return k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1])


class _Scratch:
    """One thread's own memory."""

    def __init__(self, block_tokens: int, num_tiles: int, head_dim: int) -> None:
        self.means = np.empty(block_tokens * num_tiles, dtype=np.float32)
        self.logits = np.empty(block_tokens * block_tokens * PIECE_BLOCKS, dtype=np.float32)
        self.k = np.empty((PIECE_BLOCKS, block_tokens, head_dim), dtype=np.float32)
        self.v = np.empty((PIECE_BLOCKS, block_tokens, head_dim + 1), dtype=np.float32)


def _accumulate(
    logits: NDArray[np.float32],
    v: NDArray[np.float32],
    total: NDArray[np.float32] | None,
    peak: NDArray[np.float32] | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Add one piece to the running sums, `logits` being overwritten; rescale to the new maximum."""
    highest = logits.max(axis=1, keepdims=True)
    if peak is not None:
        np.maximum(highest, peak, out=highest)
    logits -= highest
    np.exp(logits, out=logits)
    part = logits @ v
    if total is not None and peak is not None:
        total *= np.exp(peak - highest)
        part += total
    return part, highest
