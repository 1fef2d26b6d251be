"""How the emulator's own tests run a probe: arrays in, arrays out, one emulated device each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.device import Device, KernelSource
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
    """Run a probe on an emulated device of its own; `options` are EmulatedDevice's.

    Array arguments are uploaded and passed as pointers; returned are those after the launch.
    """
    device = EmulatedDevice(arch, folder=PROBES, **options)
    try:
        return run_on(device, source, arguments, block, grid, shared_bytes)
    finally:
        device.close()


def run_on(
    device: Device,
    source: KernelSource,
    arguments: tuple[Any, ...],
    block: int,
    grid: tuple[int, ...],
    shared_bytes: int,
) -> list[NDArray[Any]]:
    """The same on a given device."""
    with ExitStack() as stack:

        def put(array: NDArray[Any]) -> int:
            memory = stack.enter_context(closing(device.allocate(array.nbytes)))
            device.upload(memory.address, array)
            return memory.address

        arrays = [np.array(argument) for argument in arguments if _is_array(argument)]
        addresses = [put(array) for array in arrays]
        waiting = iter(addresses)
        args = tuple(_argument(device, one, put, waiting) for one in arguments)
        device.launch(source, grid, block, args, shared_bytes=shared_bytes)
        for address, array in zip(addresses, arrays, strict=True):
            device.download(address, array)
        return arrays


def _is_array(argument: object) -> bool:
    return isinstance(argument, np.ndarray)


def _argument(
    device: Device, given: Any, put: Callable[[NDArray[Any]], int], addresses: Iterator[int]
) -> Any:
    if _is_array(given):
        return next(addresses)
    if not isinstance(given, Map):
        return given
    address, stride_bytes = put(given.matrix), given.matrix.strides[0]
    return device.tensor_map(address, given.matrix.shape, stride_bytes, given.box)
