"""Memory and copies on a GPU, on the driver's own calls: allocations, pinned staging, tensor maps.

`CudaDevice` is the only user. Uploads are copied into one of two pinned slots, which the copy
engine empties while the other one fills; so the caller's array is free at once, and a model of
1.2 GB is bound by the host's own copy. Refuses nothing itself: `CudaDevice` checks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import Buffer
from cuda.core._tensor_map import TensorMapDataType, TensorMapL2Promotion, TensorMapSwizzle
from cuda.core.utils import StridedMemoryView
from numpy.typing import NDArray

from kernels.cuda_calls import call

SLOT_BYTES = 16 << 20  # at 16 MiB the set-up of a copy no longer shows beside its 0.3 ms
ALIGNMENT = 256  # of pieces inside a slot


class CudaMemory:
    """An allocation; `Memory` of the protocol."""

    def __init__(self, address: int, num_bytes: int, release: Callable[[int], None]) -> None:
        self.address, self.num_bytes = address, num_bytes
        self._release: Callable[[int], None] | None = release

    def close(self) -> None:
        if self._release is not None:
            release, self._release = self._release, None
            release(self.address)


class _Slot:
    """Pinned host memory and the event behind the last copy out of it."""

    def __init__(self) -> None:
        self.address = int(call("cuMemHostAlloc", driver.cuMemHostAlloc(SLOT_BYTES, 0)))
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * SLOT_BYTES).from_address(self.address)
        )
        self.emptied = call(
            "cuEventCreate",
            driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value),
        )
        self.used = 0

    def close(self) -> None:
        with ExitStack() as stack:  # both, whatever the other one raises
            stack.callback(lambda: call("cuMemFreeHost", driver.cuMemFreeHost(self.address)))
            stack.callback(lambda: call("cuEventDestroy", driver.cuEventDestroy(self.emptied)))


class Staging:
    """Two pinned slots in front of one stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._filling, self._emptying = _Slot(), _Slot()

    def upload(self, address: int, data: NDArray[np.uint8]) -> None:
        """Queue the copy of `data` (uint8 [num_bytes]) to the device; it is free on return."""
        sent = 0
        while sent < data.size:
            left = data.size - sent
            room = SLOT_BYTES - self._filling.used
            if room < min(left, SLOT_BYTES):
                self._turn()
                room = SLOT_BYTES
            self._send(address + sent, data[sent : sent + min(left, room)])
            sent += min(left, room)

    def _send(self, address: int, piece: NDArray[np.uint8]) -> None:
        slot = self._filling
        slot.bytes[slot.used : slot.used + piece.size] = piece
        call(
            "upload",
            driver.cuMemcpyHtoDAsync(address, slot.address + slot.used, piece.size, self._stream),
        )
        slot.used = min(SLOT_BYTES, -(-(slot.used + piece.size) // ALIGNMENT) * ALIGNMENT)

    def _turn(self) -> None:
        """Mark what left the full slot; take the other one once it is empty."""
        call("upload", driver.cuEventRecord(self._filling.emptied, self._stream))
        self._filling, self._emptying = self._emptying, self._filling
        call("upload", driver.cuEventSynchronize(self._filling.emptied))
        self._filling.used = 0

    def close(self) -> None:
        """Give the slots back; the stream must be idle."""
        with ExitStack() as stack:
            stack.callback(self._filling.close)
            stack.callback(self._emptying.close)


def encode_tensor_map(
    address: int, shape: tuple[int, int], row_stride_bytes: int, box: tuple[int, int]
) -> Any:
    """Tensor map of a bf16 matrix as `cuda.core.launch` takes it: 128-byte swizzle, zeros outside.

    Loads are promoted to 256 bytes in L2, since the next box is the other half of the same row.
    """
    rows, columns = shape
    extent = (rows - 1) * row_stride_bytes + columns * 2
    view = StridedMemoryView.from_buffer(
        Buffer.from_handle(address, extent),
        shape=shape,
        strides=(row_stride_bytes // 2, 1),
        dtype=np.dtype(np.uint16),
    )
    return view.as_tensor_map(
        box_dim=box,
        data_type=TensorMapDataType.BFLOAT16,
        swizzle=TensorMapSwizzle.SWIZZLE_128B,
        l2_promotion=TensorMapL2Promotion.L2_256B,
    )
