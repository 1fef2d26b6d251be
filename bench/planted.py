"""Block lists of a stated density, for benchmarks of models whose own attention says nothing.

Random weights give flat attention: the threshold then keeps every block, and a sparse pass costs
what a dense one does. `PlantedLists` stands in for the selection (means, scores and selection still
run and are timed): one list per query head, the same on each layer, the forced blocks (sinks,
window, last full tiles) and then blocks drawn evenly. Only entry points under bench/ pass it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.reference import BlockLists, BlockRule


class PlantedLists:
    """Draws lists once per size and hands the same ones out for every layer.

    Args:
        density: kept pairs of blocks / causal pairs, or the forced blocks' own where that is more;
            None: nothing is planted, the selection decides.
        seed: of the draw.
    """

    def __init__(self, density: float | None, *, seed: int = 0) -> None:
        self.density = density
        self._seed = seed
        self._key: object = None
        self._lists: BlockLists | None = None

    def __call__(
        self, layer: int, num_heads: int, num_tiles: int, rule: BlockRule
    ) -> BlockLists | None:
        """Give the lists of a layer; see `drafter_svc.cuda_backend.Planter`."""
        if self.density is None:
            return None
        key = (self.density, num_heads, num_tiles, rule)
        if key != self._key:
            self._lists = plant(self.density, num_heads, num_tiles, rule, seed=self._seed)
            self._key = key
        return self._lists


def forced_blocks(tile: int, num_tiles: int, rule: BlockRule) -> NDArray[np.bool_]:
    """Which of a tile's causal blocks no selection may leave out: bool [tile + 1]."""
    forced = np.zeros(tile + 1, dtype=np.bool_)
    forced[: rule.sink_blocks] = True
    forced[max(0, tile + 1 - rule.window_blocks) :] = True
    forced[:] |= tile >= num_tiles - rule.last_full_blocks
    return forced


def row_sizes(density: float, num_tiles: int, rule: BlockRule) -> NDArray[np.int64]:
    """Blocks per tile: in proportion to its causal blocks, never fewer than the forced ones.

    The share is found by bisection, so that the sum meets the density as nearly as whole blocks
    can; where the forced blocks alone exceed it, the sizes are theirs.
    """
    visible = np.arange(1, num_tiles + 1)
    floor = np.array([forced_blocks(i, num_tiles, rule).sum() for i in range(num_tiles)])
    wanted = density * visible.sum()
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        if np.clip(np.floor(share * visible), floor, visible).sum() < wanted:
            low = share
        else:
            high = share
    sizes: NDArray[np.int64] = np.clip(np.floor(low * visible), floor, visible).astype(np.int64)
    return sizes


def plant(
    density: float, num_heads: int, num_tiles: int, rule: BlockRule, *, seed: int = 0
) -> BlockLists:
    """Draw the lists of one layer."""
    rng = np.random.default_rng(seed)
    sizes = row_sizes(density, num_tiles, rule)
    indices = np.full((num_heads, num_tiles, num_tiles), -1, dtype=np.int32)
    for tile, size in enumerate(sizes):
        forced = forced_blocks(tile, num_tiles, rule)
        free = np.flatnonzero(~forced)
        extra = int(size - forced.sum())
        for head in range(num_heads):
            keep = forced.copy()
            keep[rng.choice(free, extra, replace=False, shuffle=False)] = True
            indices[head, tile, :size] = np.flatnonzero(keep)
    counts = np.tile(sizes.astype(np.int32), (num_heads, 1))
    return BlockLists(indices, counts, np.zeros((num_heads, num_tiles), dtype=np.bool_))
