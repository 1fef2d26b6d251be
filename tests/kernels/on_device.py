"""Arrays in a device's memory for one test, and bf16 as the devices hold it: raw uint16 bits."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.device import Device
from kernels.reference import round_to_bf16


def to_bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The bits of the nearest bf16."""
    rounded = round_to_bf16(np.asarray(values, dtype=np.float32))
    return (rounded.view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bf16 bits, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Arrays:
    """Allocations of one test, each exactly as large as its array; given back on exit."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._stack = ExitStack()

    def __enter__(self) -> Arrays:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(self, array: NDArray[Any]) -> int:
        """Upload a copy and give its address."""
        address = self._allocate(array.nbytes)
        self.device.upload(address, np.ascontiguousarray(array))
        return address

    def poisoned(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> int:
        """Memory for an output, each byte 0xff: NaN, or -1."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._allocate(num_bytes)
        self.device.fill(address, num_bytes, 0xFF)
        return address

    def get(self, address: int, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Download what stands at an address."""
        out = np.empty(shape, dtype=dtype)
        self.device.download(address, out)
        return out

    def _allocate(self, num_bytes: int) -> int:
        memory = self.device.allocate(num_bytes)
        self._stack.callback(memory.close)
        return memory.address
