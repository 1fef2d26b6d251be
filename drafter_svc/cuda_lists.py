"""The block lists of a pass: selected layer by layer on the GPU, or planted by a benchmark.

Means, scores and selection always run (benchmarks time them); what attention then reads is either
their result or the lists of a `Planter`. Counts of kept and cut blocks stay on the GPU, one row a
layer, and are downloaded together when the pass is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from drafter_svc.backend import AttentionConfig
from drafter_svc.cuda_workspace import PassSize, Workspace
from kernels.device import Device, Memory
from kernels.reference import BlockLists, BlockRule

# (layer, num_heads, num_tiles, rule) -> the lists that attention reads, or None: the selected ones.
Planter: TypeAlias = Callable[[int, int, int, BlockRule], BlockLists | None]


@dataclass(frozen=True)
class ListAddresses:
    """int32 indices [num_heads, num_tiles, num_blocks] and counts [num_heads, num_tiles]."""

    indices: int
    counts: int


def rule_of(attention: AttentionConfig) -> BlockRule:
    """The selection that a request asks for."""
    return BlockRule(
        alpha=attention.alpha,
        sink_blocks=attention.sink_blocks,
        window_blocks=attention.window_blocks,
        last_full_blocks=attention.last_full_blocks,
        max_density=attention.max_density,
    )


class PlantedOnDevice:
    """Keeps the planted lists that were uploaded last."""

    def __init__(self, device: Device, planter: Planter | None) -> None:
        self._device, self._planter = device, planter
        self._lists: BlockLists | None = None
        self._memory: Memory | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._memory.num_bytes if self._memory else 0

    def of_layer(
        self, layer: int, num_heads: int, num_tiles: int, rule: BlockRule
    ) -> tuple[BlockLists, ListAddresses] | None:
        """The lists of a layer, uploaded unless they are those of the call before."""
        lists = self._planter(layer, num_heads, num_tiles, rule) if self._planter else None
        if lists is None:
            return None
        if lists is not self._lists or self._memory is None:
            self.close()
            self._memory = self._device.allocate(_counts_at(lists) + lists.counts.nbytes)
            self._device.upload(self._memory.address, lists.indices)
            self._device.upload(self._memory.address + _counts_at(lists), lists.counts)
            self._lists = lists
        at = self._memory.address
        return lists, ListAddresses(at, at + _counts_at(lists))

    def close(self) -> None:
        """Give the lists' memory back; idempotent."""
        if self._memory is not None:
            self._memory.close()
        self._memory = self._lists = None


def _counts_at(lists: BlockLists) -> int:
    """Bytes from the indices to the counts, which begin on 16."""
    return -(-lists.indices.nbytes // 16) * 16


class PassLists:
    """The lists of one pass, layer by layer."""

    def __init__(
        self,
        device: Device,
        workspace: Workspace,
        size: PassSize,
        num_heads: int,
        rule: BlockRule,
        planted: PlantedOnDevice,
    ) -> None:
        self._device, self._workspace, self._size = device, workspace, size
        self._num_heads, self._rule, self._planted = num_heads, rule, planted
        self._planted_density: dict[int, float] = {}

    @property
    def rule(self) -> BlockRule:
        """What the selection keeps."""
        return self._rule

    def selected(self, layer: int) -> tuple[int, int, int]:
        """Where the selection of a layer writes: indices, counts, cut."""
        rows = layer * self._size.list_rows(self._num_heads)
        at = self._workspace.at
        return at("indices"), at("counts") + 4 * rows, at("cut") + rows

    def to_read(self, layer: int) -> ListAddresses | None:
        """What the attention of a layer reads; None: every causal block."""
        if not self._size.sparse:
            return None
        planted = self._planted.of_layer(layer, self._num_heads, self._size.num_blocks, self._rule)
        if planted is None:
            return ListAddresses(*self.selected(layer)[:2])
        self._planted_density[layer] = planted[0].density
        return planted[1]

    def result(self) -> tuple[tuple[float, ...], float]:
        """Density of each layer that attended, and the share of rows that were cut."""
        layers = self._size.num_attending
        if not self._size.sparse or layers == 0:
            return (1.0,) * layers, 0.0
        shape = (layers, self._size.list_rows(self._num_heads))
        counts: NDArray[np.int32] = np.empty(shape, dtype=np.int32)
        cut: NDArray[np.uint8] = np.empty(shape, dtype=np.uint8)
        self._device.download(self._workspace.at("counts"), counts)
        self._device.download(self._workspace.at("cut"), cut)
        num_rows = self._num_heads * self._size.num_blocks
        counts, cut = counts[:, :num_rows], cut[:, :num_rows]
        causal_pairs = num_rows * (self._size.num_blocks + 1) // 2
        densities = counts.sum(axis=1, dtype=np.int64) / causal_pairs
        for layer, density in self._planted_density.items():
            densities[layer] = density
        kept = [layer for layer in range(layers) if layer not in self._planted_density]
        share = float(np.count_nonzero(cut[kept]) / cut.size)
        return tuple(float(density) for density in densities), share
