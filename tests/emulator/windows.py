"""Other processes' memory on the emulated device: windows, pinned memory, late copies.

Window addresses have nothing behind them unless a region is mapped, so that a use of a parked one
is a fault. A copy of the copy queue is done as late as a GPU may do it, when its mark is waited for
(or a later one, or everything): work that forgets to wait for its mark reads what was there before.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kernels.errors import HandleError, InvalidArgument
from kernels.ipc.fake_physical import GRANULARITY_BYTES


class EmulatedPinned:
    """A host array; `finish` does the copies out of it."""

    def __init__(self, array: NDArray[np.uint8], finish: Callable[[], None]) -> None:
        if array.dtype != np.uint8 or not array.flags.c_contiguous or array.size == 0:
            got = f"{array.size} of {array.dtype} with strides {array.strides}"
            raise InvalidArgument.value("pin", "array", got, "at least one C-contiguous uint8")
        self.num_bytes = array.nbytes
        self._array: NDArray[np.uint8] | None = array.reshape(-1)
        self._finish = finish

    def bytes_of(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """A part of the array; InvalidArgument when it is closed or the part lies outside."""
        if self._array is None or not 0 <= offset <= self.num_bytes - num_bytes:
            got = f"{num_bytes} bytes at {offset}" + (", closed" if self._array is None else "")
            raise InvalidArgument.value(
                "copy_in", "the range", got, f"inside the {self.num_bytes} pinned bytes"
            )
        return self._array[offset : offset + num_bytes]

    def close(self) -> None:
        """Do the copies out of it and forget the array."""
        if self._array is not None:
            self._finish()
            self._array = None


class CopyQueue:
    """Copies in the order of their calls, done when somebody waits for one."""

    def __init__(self) -> None:
        self._waiting: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        self._done = 0
        self._lock = threading.Lock()

    def add(self, target: NDArray[np.uint8], source: NDArray[np.uint8]) -> int:
        """Queue a copy; its number."""
        with self._lock:
            self._waiting.append((target, source))
            return self._done + len(self._waiting)

    def finish(self, number: int | None = None) -> None:
        """Do the copies up to a number, or all."""
        with self._lock:
            count = len(self._waiting) if number is None else max(0, number - self._done)
            for target, source in self._waiting[:count]:
                target[:] = source
            del self._waiting[:count]
            self._done += count


class EmulatedWindow:
    """Addresses of the emulated device; `Window` of the protocol.

    Args:
        runtime: the emulator's.
        size_bytes: at least 1; rounded up as a GPU does.
        sizes: the device's allocations; holds the window while it is mapped.
        finish: does all queued copies.
    """

    def __init__(
        self,
        runtime: ctypes.CDLL,
        size_bytes: int,
        sizes: dict[int, int],
        finish: Callable[[], None],
    ) -> None:
        if size_bytes < 1:
            raise InvalidArgument.value("reserve", "size_bytes", size_bytes, "at least 1")
        self.size_bytes = -(-size_bytes // GRANULARITY_BYTES) * GRANULARITY_BYTES
        self._runtime, self._sizes, self._finish = runtime, sizes, finish
        runtime.emu_window_reserve.restype = ctypes.c_uint64
        runtime.emu_window_reserve.argtypes = [ctypes.c_uint64]
        runtime.emu_window_map.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
        runtime.emu_window_unmap.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self.address: int = runtime.emu_window_reserve(self.size_bytes)
        if not self.address:
            raise HandleError("reserve", f"no addresses for {self.size_bytes:,} bytes")
        self.closed = False

    @property
    def mapped(self) -> bool:
        """Whether a region lies behind the addresses."""
        return self.address in self._sizes

    def map(self, fd: int) -> None:
        """Put a region behind the addresses; the descriptor is closed in every case."""
        try:
            if self.mapped or self.closed:
                state = "closed" if self.closed else "mapped already"
                raise HandleError("map", f"the window is {state}")
            status = self._runtime.emu_window_map(self.address, self.size_bytes, fd)
            if status:
                raise HandleError(
                    "map", f"no region of {self.size_bytes:,} bytes: {os.strerror(status)}"
                )
            self._sizes[self.address] = self.size_bytes
        finally:
            _close(fd)

    def unmap(self) -> None:
        """Do the queued copies, then let the region go."""
        if self.mapped:
            self._finish()
            del self._sizes[self.address]
            self._runtime.emu_window_unmap(self.address, self.size_bytes)

    def close(self) -> None:
        """Unmap; the addresses are never given out again, so that a use of them is a fault."""
        self.unmap()
        self.closed = True


class EmulatedImport:
    """Memory that was opened by a handle; `Memory` of the protocol."""

    def __init__(self, window: EmulatedWindow) -> None:
        self.address, self.num_bytes = window.address, window.size_bytes
        self._window = window

    def close(self) -> None:
        """Let it go; each later use is a fault. A second call does nothing."""
        self._window.close()


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:  # was no descriptor, which `map` has said
        return
