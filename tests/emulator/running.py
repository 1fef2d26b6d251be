"""How the emulator's own tests run a probe: arrays in, arrays out, one emulated device each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.device import KernelSource
from tests.emulator.device import EmulatedDevice

PROBES = Path(__file__).resolve().parent / "probes"
Run = Callable[..., list[NDArray[Any]]]


@dataclass(frozen=True)
class Map:
    """An argument that becomes a tensor map of an uploaded bf16 matrix."""

    matrix: NDArray[np.uint16]
    box: tuple[int, int]


def run_probe(
    source: KernelSource,
    *arguments: Any,
    block: int = 32,
    grid: tuple[int, ...] = (1,),
    shared_bytes: int = 0,
    arch: str = "sm_80",
    **options: Any,
) -> list[NDArray[Any]]:
    """Run a probe on a device of its own; `options` are EmulatedDevice's.

    Array arguments are uploaded and passed as pointers; returned are those after the launch.
    """
    device = EmulatedDevice(arch, folder=PROBES, **options)
    try:
        arrays = [np.array(argument) for argument in arguments if _is_array(argument)]
        memories = [device.allocate(array.nbytes) for array in arrays]
        for memory, array in zip(memories, arrays, strict=True):
            device.upload(memory.address, array)
        addresses = iter([memory.address for memory in memories])
        args = tuple(_argument(device, one, addresses) for one in arguments)
        device.launch(source, grid, block, args, shared_bytes=shared_bytes)
        for memory, array in zip(memories, arrays, strict=True):
            device.download(memory.address, array)
        return arrays
    finally:
        device.close()


def _is_array(argument: object) -> bool:
    return isinstance(argument, np.ndarray)


def _argument(device: EmulatedDevice, given: Any, addresses: Iterator[int]) -> Any:
    if _is_array(given):
        return next(addresses)
    if not isinstance(given, Map):
        return given
    memory = device.allocate(given.matrix.nbytes)
    device.upload(memory.address, given.matrix)
    stride_bytes = given.matrix.strides[0]
    return device.tensor_map(memory.address, given.matrix.shape, stride_bytes, given.box)
