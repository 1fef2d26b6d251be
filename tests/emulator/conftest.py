"""How the emulator's own tests run a probe: arrays in, arrays out, one emulated device each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.device import KernelSource
from tests.emulator.device import EmulatedDevice
from tests.tools import require_tool

PROBES = Path(__file__).resolve().parent / "probes"
Run = Callable[..., list[NDArray[Any]]]


@pytest.fixture
def run() -> Run:
    """`run(source, *arguments, block=, shared_bytes=, grid=, **device options)`.

    Array arguments are uploaded and passed as pointers; returned are all arrays after the launch.
    """
    require_tool("g++")

    def launch(
        source: KernelSource,
        *arguments: Any,
        block: int = 32,
        grid: tuple[int, ...] = (1,),
        shared_bytes: int = 0,
        arch: str = "sm_80",
        **options: Any,
    ) -> list[NDArray[Any]]:
        device = EmulatedDevice(arch, folder=PROBES, **options)
        try:
            arrays = [np.array(argument) for argument in arguments if _is_array(argument)]
            memories = [device.allocate(array.nbytes) for array in arrays]
            for memory, array in zip(memories, arrays, strict=True):
                device.upload(memory.address, array)
            addresses = iter([memory.address for memory in memories])
            args = tuple(next(addresses) if _is_array(one) else one for one in arguments)
            device.launch(source, grid, block, args, shared_bytes=shared_bytes)
            for memory, array in zip(memories, arrays, strict=True):
                device.download(memory.address, array)
            return arrays
        finally:
            device.close()

    return launch


def _is_array(argument: object) -> bool:
    return isinstance(argument, np.ndarray)
