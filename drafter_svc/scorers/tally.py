"""What the scored layers add up to: one score per chunk, and the coverage panel.

The pass hands in each scored layer's queries and keys while they live; nothing per token outlives
the pass but one running maximum per query. Refuses scores that are not finite (EngineFault): a
selection made of them would be arbitrary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.reference import chunk_mean, chunk_sum, tail_score
from skim.errors import EngineFault

# The panel keeps early, middle and late layers apart: they look for different things, and a mean
# over all of them would let one group's certainty hide another's.
LAYER_GROUPS = 3


def layer_groups(num_layers: int) -> NDArray[np.int64]:
    """The group of each scored layer, int64 [num_layers]: thirds, or one a layer if fewer."""
    return np.arange(num_layers) * min(LAYER_GROUPS, num_layers) // num_layers


class Tally:
    """Gathers the scored layers of one pass.

    Args:
        positions: int64 [num_queries], see `attention_rows`.
        num_tokens: prompt length, and number of keys.
        num_layers: scored layers that will come.
    """

    def __init__(
        self,
        positions: NDArray[np.int64],
        num_tokens: int,
        num_layers: int,
        *,
        chunk_tokens: int,
        pool_kernel: int,
    ) -> None:
        self._positions = positions
        self._chunk_tokens = chunk_tokens
        self._pool_kernel = pool_kernel
        self._groups = layer_groups(num_layers)
        self._added = 0
        self._running_max = np.zeros((positions.size, num_tokens), dtype=np.float32)
        num_chunks = -(-num_tokens // chunk_tokens)
        shape = (int(self._groups[-1]) + 1, positions.size, num_chunks)
        self._panel = np.zeros(shape, dtype=np.float64)

    @property
    def num_queries(self) -> int:
        """Queries per layer."""
        return int(self._positions.size)

    def add_layer(self, queries: NDArray[np.float32], keys: NDArray[np.float32]) -> None:
        """Add one layer.

        Args:
            queries: [num_heads, num_queries, head_dim], rotated, already times the softmax scale.
            keys: [num_kv_heads, num_tokens, head_dim], rotated.
        """
        rows = tail_score(
            queries,
            keys,
            self._positions,
            self._running_max,
            scale=1.0,
            pool_kernel=self._pool_kernel,
        )
        group = self._groups[self._added]
        self._panel[group] += chunk_sum(rows, self._chunk_tokens)
        self._added += 1

    def scores(self) -> NDArray[np.float32]:
        """Mean over the queries, then over each chunk: float32 [num_chunks].

        Raises:
            EngineFault: a score is not finite.
        """
        scores = chunk_mean(self._running_max.mean(axis=0), self._chunk_tokens)
        if not np.isfinite(scores).all():
            raise EngineFault("the drafter's attention is not finite", reason="SCORES_NOT_FINITE")
        return scores

    def panel(self) -> NDArray[np.float32]:
        """Rows (group, query), each summing to 1: float32 [groups * queries, num_chunks]."""
        layers = np.bincount(self._groups)[:, None, None]
        return (self._panel / layers).astype(np.float32).reshape(-1, self._panel.shape[-1])
