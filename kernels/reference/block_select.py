"""Which key blocks each query tile reads: threshold, forced blocks, and a bound on their number.

Keep J <= I when its mass reaches `alpha` times the row's largest, or it is a sink, or within the
window of the diagonal, or I is one of the last full tiles. Outside those, `max_density` bounds a
row: forced blocks first, then the largest mass, ties to the lower index.

Source: FlashPrefill (arXiv:2603.06199), block selection; the bound is our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Below 8 blocks a bound would cut into what sink and window force by default (2 + 4).
MIN_BOUND_BLOCKS = 8


@dataclass(frozen=True)
class BlockRule:
    """The parameters of the selection; `AttentionConfig` of the drafter states their ranges."""

    alpha: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    last_full_blocks: int = 2
    max_density: float = 0.25

    def bound(self, tile: int) -> int:
        """Most blocks that tile `tile` may keep, its forced blocks aside."""
        # 1e-9: 0.1 x 30 must be 3 blocks, whatever binary fractions make of it.
        return max(MIN_BOUND_BLOCKS, math.ceil(self.max_density * (tile + 1) - 1e-9))


@dataclass(frozen=True)
class BlockLists:
    """The selection, one list per query head and tile.

    Attributes:
        indices: int32 [num_heads, num_tiles, num_blocks], ascending, then -1.
        counts: int32 [num_heads, num_tiles].
        cut: bool [num_heads, num_tiles], true where `max_density` dropped a block.
    """

    indices: NDArray[np.int32]
    counts: NDArray[np.int32]
    cut: NDArray[np.bool_]

    @property
    def density(self) -> float:
        """Kept pairs of blocks / causal pairs of blocks."""
        num_heads, num_tiles = self.counts.shape
        causal_pairs = num_heads * num_tiles * (num_tiles + 1) // 2
        return float(self.counts.sum() / causal_pairs)

    def row(self, head: int, tile: int) -> NDArray[np.int32]:
        """The blocks that one tile of one head reads."""
        return self.indices[head, tile, : self.counts[head, tile]]


def select_row(
    mass: NDArray[np.floating], tile: int, num_tiles: int, rule: BlockRule
) -> tuple[NDArray[np.int32], bool]:
    """Choose the blocks of one tile.

    Args:
        mass: [at least tile + 1]; entries past the diagonal are not read.
        tile: index of the query tile.
        num_tiles: tiles of the whole prompt.
    Returns:
        (ascending int32 block indices, whether `max_density` cut the row).
    """
    visible = tile + 1
    if tile >= num_tiles - rule.last_full_blocks:
        return np.arange(visible, dtype=np.int32), False
    mass = mass[:visible]
    keep = mass >= rule.alpha * mass.max()
    forced = np.zeros(visible, dtype=np.bool_)
    forced[: rule.sink_blocks] = True
    forced[max(0, visible - rule.window_blocks) :] = True
    keep |= forced
    room = rule.bound(tile) - int(np.count_nonzero(forced))
    candidates = np.flatnonzero(keep & ~forced)
    cut = candidates.size > max(0, room)
    if cut:
        strongest_first = np.argsort(-mass[candidates], kind="stable")
        keep = forced
        keep[candidates[strongest_first[: max(0, room)]]] = True
    return np.flatnonzero(keep).astype(np.int32), cut


def block_select(mass: NDArray[np.floating], rule: BlockRule) -> BlockLists:
    """Choose the blocks of every tile of every head.

    Args:
        mass: [num_heads, num_tiles, num_blocks] of `block_mass`.
    """
    num_heads, num_tiles, num_blocks = mass.shape
    indices = np.full((num_heads, num_tiles, num_blocks), -1, dtype=np.int32)
    counts = np.zeros((num_heads, num_tiles), dtype=np.int32)
    cut = np.zeros((num_heads, num_tiles), dtype=np.bool_)
    for head in range(num_heads):
        for tile in range(num_tiles):
            row, cut[head, tile] = select_row(mass[head, tile], tile, num_tiles, rule)
            indices[head, tile, : row.size] = row
            counts[head, tile] = row.size
    return BlockLists(indices, counts, cut)
