"""The drafter's forward pass on the CPU: the whole sequence through one layer, then the next.

Only one layer's keys and values live at a time (unless look-ahead asks for all of them), nothing
after the last scored layer's queries and keys is computed, and there is no vocabulary matrix. Every
stage is cut into pieces for the pool's threads, and the stop flag is looked at before each piece.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from drafter_svc.architecture import DrafterWeights, LayerWeights, Matrix
from drafter_svc.backend import AttentionConfig
from drafter_svc.cpu_attention import LayerBuffers, SparseAttention
from drafter_svc.cpu_pool import WorkPool
from drafter_svc.layer_math import feed_forward, normed, project, rotate
from kernels.reference import RopeScaling, rope_tables

# Rows per piece: the feed-forward's activations of a small drafter (2 x 448 floats a row) then stay
# in the second-level cache, and a piece still fills a matrix product.
ROWS = 256


class CpuForward:
    """One pass over one sequence.

    Attributes:
        x: float32 [num_tokens, embed], the residual stream.
        buffers: the current layer's queries, keys, values and attention output.
        attention: holds the density of the layers so far.
        stage_s: seconds by stage.
    """

    def __init__(
        self,
        weights: DrafterWeights,
        ids: NDArray[np.int32],
        scaling: RopeScaling,
        attention: AttentionConfig,
        pool: WorkPool,
        stop: threading.Event,
    ) -> None:
        self.stage_s: dict[str, float] = dict.fromkeys(
            ("embed", "project", "attend", "mlp", "score"), 0.0
        )
        self._weights = weights
        self._shape = shape = weights.shape
        self._pool = pool
        self._stop = stop
        self._scale = np.float32(1.0 / math.sqrt(shape.head_dim))
        started = time.perf_counter()
        self.x: Matrix = weights.embedding[ids]
        self._cosine, self._sine = rope_tables(
            np.arange(ids.size),
            shape.head_dim,
            shape.rope.freq_base,
            scaling,
            weights.frequency_divisors,
        )
        self.buffers = LayerBuffers(
            ids.size, shape.heads, shape.kv_heads, shape.head_dim, attention.block_tokens
        )
        self.attention = SparseAttention(self.buffers, attention, pool)
        self.stage_s["embed"] = time.perf_counter() - started

    def project_layer(self, index: int) -> None:
        """Fill the buffers with every position's queries, keys and values of layer `index`."""
        layer, shape, buffers = self._weights.layers[index], self._shape, self.buffers
        turned = shape.heads + shape.kv_heads
        keys, values = buffers.keys(), buffers.values()

        def piece(begin: int, end: int) -> None:
            y = normed(self.x[begin:end], layer, shape)
            heads = project(y, layer, shape, 0, turned + shape.kv_heads)
            rotated = self._rotate(heads[:, :turned], layer, 0, slice(begin, end))
            queries = rotated[:, : shape.heads].swapaxes(0, 1)
            np.multiply(queries, self._scale, out=buffers.q[:, begin:end])
            keys[:, begin:end] = rotated[:, shape.heads :].swapaxes(0, 1)
            values[:, begin:end] = heads[:, turned:].swapaxes(0, 1)

        self._by_rows("project", self.x.shape[0], piece)

    def project_keys(self, index: int, num_tokens: int) -> None:
        """Fill the buffers with the keys alone of the first `num_tokens` positions."""
        layer, shape, keys = self._weights.layers[index], self._shape, self.buffers.keys()

        def piece(begin: int, end: int) -> None:
            y = normed(self.x[begin:end], layer, shape)
            heads = project(y, layer, shape, shape.heads, shape.kv_heads)
            rotated = self._rotate(heads, layer, shape.heads, slice(begin, end))
            keys[:, begin:end] = rotated.swapaxes(0, 1)

        self._by_rows("project", num_tokens, piece)

    def queries_at(self, index: int, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Project the queries of a few positions: [num_heads, num_positions, head_dim], scaled."""
        layer, shape = self._weights.layers[index], self._shape
        heads = project(normed(self.x[positions], layer, shape), layer, shape, 0, shape.heads)
        return self._rotate(heads, layer, 0, positions).swapaxes(0, 1) * self._scale

    def finish_layer(self, index: int) -> None:
        """Attend, add the attention's output and the feed-forward: `x` is layer `index`'s output.

        Raises:
            Cancelled: the stop flag was set.
        """
        started = time.perf_counter()
        self.attention.run(self._stop)
        self.stage_s["attend"] += time.perf_counter() - started
        layer = self._weights.layers[index]

        def piece(begin: int, end: int) -> None:
            feed_forward(self.x[begin:end], self.buffers.out[begin:end], layer, self._shape)

        self._by_rows("mlp", self.x.shape[0], piece)

    def _rotate(
        self, heads: Matrix, layer: LayerWeights, first_head: int, at: slice | NDArray[np.int64]
    ) -> Matrix:
        return rotate(heads, layer, self._shape, first_head, self._cosine[at], self._sine[at])

    def _by_rows(self, stage: str, num_rows: int, work: Callable[[int, int], None]) -> None:
        """Share `work(begin, end)` over chunks of rows out to the pool, and time it."""
        started = time.perf_counter()
        self._pool.run(
            -(-num_rows // ROWS),
            lambda piece, _: work(piece * ROWS, min((piece + 1) * ROWS, num_rows)),
            self._stop,
        )
        self.stage_s[stage] += time.perf_counter() - started
