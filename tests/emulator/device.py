"""A device without a GPU: runs the kernels' real sources on the CPU, one thread after another.

It implements `kernels.device.Device` for tests and refuses what a GPU would do wrong in silence: an
access outside an allocation, lanes that diverge at a warp operation, a barrier that nobody reaches,
data read before its copy was waited for, arguments that do not fit the kernel's signature. Memory
and shared memory start as 0xff, which is NaN; a region of `kernels.ipc.fake_physical` starts as 0.
It says nothing about speed.
"""

from __future__ import annotations

import ctypes
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.device import Arg, KernelSource, Mark, Memory, Pinned, TensorMap, Window
from kernels.errors import InvalidArgument, LaunchError, OutOfMemory
from kernels.ipc.fake_legacy import open_handle
from kernels.ipc.fake_physical import FAKE_UUID
from tests.emulator.build import KERNELS, Edit, build_kernel, load_runtime
from tests.emulator.launching import (
    Kernel,
    Order,
    check_sizes,
    load_kernel,
    pack_arguments,
    run,
)
from tests.emulator.windows import CopyQueue, EmulatedImport, EmulatedPinned, EmulatedWindow


class EmulatedMemory:
    """One allocation that ends at a page without access; 16-byte aligned, unlike a GPU's 256."""

    def __init__(self, device: EmulatedDevice, address: int, num_bytes: int) -> None:
        self.address, self.num_bytes = address, num_bytes
        self._device: EmulatedDevice | None = device

    def close(self) -> None:
        """Give the bytes back; each later use is an error. A second call does nothing."""
        if self._device:
            self._device.release(self.address)
            self._device = None


class EmulatedMark:
    """A position: of the work, reached when recorded; of the copies, when `reach` is called."""

    def __init__(self, reach: Callable[[], None] | None = None) -> None:
        self._reach = reach
        self._at_s = time.perf_counter()

    def wait(self) -> None:
        """Do what the copy queue still has before it. Launches are over when they return."""
        if self._reach is not None:
            self._reach()
            self._reach, self._at_s = None, time.perf_counter()

    def seconds_since(self, earlier: Mark) -> float:
        """Host time between the two."""
        assert isinstance(earlier, EmulatedMark)
        self.wait()
        return self._at_s - earlier._at_s


class EmulatedDevice:
    """The CPU behind the interface of a GPU.

    Args:
        arch: what the kernels are compiled as; decides which path they take and how much shared
            memory a block gets.
        total_bytes: allocations beyond it raise OutOfMemory.
        order: in which order threads, warps and blocks get to run.
        check_races: run each launch in both orders, from the same memory, and refuse results that
            differ in a bit (a missing barrier usually shows). For small sizes.
        workers: 2 shares the blocks of a launch with a forked process.
        folder: where the sources lie.
        edits: defects to plant.
        uuid: which GPU it says it is; a fake landlord's by default.
    """

    def __init__(
        self,
        arch: str = "sm_80",
        *,
        total_bytes: int = 4 << 30,
        order: Order = "forward",
        check_races: bool = False,
        workers: int = 1,
        folder: Path = KERNELS,
        edits: Sequence[Edit] = (),
        uuid: str = FAKE_UUID,
    ) -> None:
        self.uuid = uuid
        self.name, self.arch, self.num_sms = f"emulated {arch}", arch, 4
        self.total_bytes = total_bytes
        self.order: Order = order
        self.check_races, self.workers = check_races, workers
        self._folder, self._edits = folder, tuple(edits)
        self._runtime = load_runtime()
        self._runtime.emu_allocate.restype = ctypes.c_uint64
        self._runtime.emu_allocate.argtypes = [ctypes.c_uint64]
        self._runtime.emu_release.argtypes = [ctypes.c_uint64]
        self._sizes: dict[int, int] = {}
        self._kernels: dict[KernelSource, Kernel] = {}
        self._copies = CopyQueue()
        self._windows: list[EmulatedWindow] = []

    # ---- memory ----------------------------------------------------------------------

    def free_bytes(self) -> int:
        """What the allocations and mapped windows leave of `total_bytes`."""
        return self.total_bytes - sum(self._sizes.values())

    def allocate(self, num_bytes: int) -> Memory:
        """Reserve bytes, each 0xff."""
        if num_bytes < 1:
            raise InvalidArgument.value("allocate", "num_bytes", num_bytes, "at least 1")
        if num_bytes > self.free_bytes():
            raise OutOfMemory.of("allocate", num_bytes, self.free_bytes())
        address = self._runtime.emu_allocate(num_bytes)
        if not address:
            raise OutOfMemory.of("allocate", num_bytes, 0)
        self._sizes[address] = num_bytes
        return EmulatedMemory(self, address, num_bytes)

    def release(self, address: int) -> None:
        """End an allocation (EmulatedMemory.close)."""
        self._copies.finish()
        if self._sizes.pop(address, None) is not None:
            self._runtime.emu_release(address)

    def import_handle(self, handle: bytes, num_bytes: int) -> Memory:
        """Open a fake landlord's allocation, at other addresses each time."""
        window = EmulatedWindow(self._runtime, num_bytes, self._sizes, self._copies.finish)
        self._windows.append(window)
        window.map(open_handle(handle))
        return EmulatedImport(window)

    def reserve(self, size_bytes: int) -> Window:
        """Addresses without memory."""
        made = EmulatedWindow(self._runtime, size_bytes, self._sizes, self._copies.finish)
        self._windows = [*(window for window in self._windows if not window.closed), made]
        return made

    def pin(self, array: NDArray[np.uint8]) -> Pinned:
        """Remember the array."""
        return EmulatedPinned(array, self._copies.finish)

    def copy_in(
        self,
        address: int,
        pinned: Pinned,
        offset: int,
        num_bytes: int,
        *,
        after: Mark | None = None,
    ) -> Mark:
        """Queue a copy that is done when it is waited for; marks of the work are reached."""
        if num_bytes < 1:
            raise InvalidArgument.value("copy_in", "num_bytes", num_bytes, "at least 1")
        assert isinstance(pinned, EmulatedPinned)
        source = pinned.bytes_of(offset, num_bytes)
        number = self._copies.add(self._view("copy_in", address, num_bytes), source)
        return EmulatedMark(lambda: self._copies.finish(number))

    def wait_for(self, mark: Mark) -> None:
        """Do the copies before the mark: work comes at once."""
        mark.wait()

    def _inside(self, address: int, num_bytes: int) -> bool:
        starts = sorted(self._sizes)
        place = bisect_right(starts, address) - 1
        if place < 0:
            return False
        return address + num_bytes <= starts[place] + self._sizes[starts[place]]

    def _view(self, what: str, address: int, num_bytes: int) -> NDArray[np.uint8]:
        if not self._inside(address, num_bytes):
            got = f"{num_bytes} bytes at {address:#x}"
            raise InvalidArgument.value(what, "the range", got, "inside one allocation")
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a C-contiguous host array to the device."""
        if not array.flags.c_contiguous:
            raise InvalidArgument.value("upload", "array", array.strides, "C-contiguous")
        self._view("upload", address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Fill a C-contiguous host array from the device."""
        if not out.flags.c_contiguous:
            raise InvalidArgument.value("download", "out", out.strides, "C-contiguous")
        out.reshape(-1).view(np.uint8)[:] = self._view("download", address, out.nbytes)

    def fill(self, address: int, num_bytes: int, byte: int = 0) -> None:
        """Set bytes to one value."""
        self._view("fill", address, num_bytes)[:] = byte

    # ---- launches ----------------------------------------------------------------------

    def launch(
        self,
        source: KernelSource,
        grid: tuple[int, ...],
        block: int,
        args: tuple[Arg, ...],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """Run one kernel to its end; LaunchError says what a GPU would have done wrong."""
        kernel = self._kernels.get(source)
        if kernel is None:
            path = build_kernel(source, self.arch, self._folder, self._edits)
            kernel = self._kernels[source] = load_kernel(path, source.entry)
        check_sizes(source, self.arch, kernel, grid, block, shared_bytes)
        arguments = pack_arguments(
            source, kernel.signature, args, lambda address: self._inside(address, 0)
        )
        shape = (tuple(grid) + (1, 1))[:3]

        def run_in(order: Order) -> None:
            sizes, workers = self._sizes, self.workers
            run(source, kernel, shape, block, arguments, shared_bytes, order, workers, sizes)

        if not self.check_races:
            run_in(self.order)
            return
        before = self._snapshot()
        run_in("forward")
        forward = self._snapshot()
        for address, content in before.items():
            self.upload(address, content)
        run_in("reverse")
        for address, content in self._snapshot().items():
            differing = np.flatnonzero(content != forward[address])
            if differing.size:
                raise LaunchError(
                    str(source),
                    f"a race: {differing.size} bytes of the {self._sizes[address]} at {address:#x}"
                    f" depend on the order of the threads, first at byte {differing[0]}",
                )

    def _snapshot(self) -> dict[int, NDArray[np.uint8]]:
        return {a: self._view("snapshot", a, size).copy() for a, size in self._sizes.items()}

    def tensor_map(
        self, address: int, shape: tuple[int, int], row_stride_bytes: int, box: tuple[int, int]
    ) -> TensorMap:
        """Describe a bf16 matrix to the emulated copy engine."""
        rows, columns = shape
        allowed = (
            address % 16 == 0
            and row_stride_bytes % 16 == 0
            and row_stride_bytes >= 2 * columns
            and 1 <= box[0] <= 256
            and 1 <= box[1] <= 64
            and box[1] % 8 == 0
            and rows >= 1
            and columns >= 1
        )
        if not allowed:
            got = (hex(address), shape, row_stride_bytes, box)
            raise InvalidArgument.value(
                "tensor_map", "address, shape, stride, box", got, "as in kernels.device.TensorMap"
            )
        last = (rows - 1) * row_stride_bytes + 2 * columns
        self._view("tensor_map", address, last)
        return TensorMap(address, shape, row_stride_bytes, box)

    # ---- matrix product ----------------------------------------------------------------------

    def gemm(
        self,
        *,
        x: int,
        w: int,
        y: int,
        m: int,
        n: int,
        k: int,
        ldx: int,
        ldy: int,
        accumulate_f32: bool = False,
    ) -> None:
        """Y = X W^T with fp32 sums, or Y += X W^T in float32."""
        if min(m, n, k) < 1 or ldx < k or ldy < n:
            raise InvalidArgument.value("gemm", "m, n, k, ldx, ldy", (m, n, k, ldx, ldy), "fitting")
        product = self._floats("gemm x", x, m, k, ldx) @ self._floats("gemm w", w, n, k, k).T
        size = 4 if accumulate_f32 else 2
        raw = self._view("gemm y", y, ((m - 1) * ldy + n) * size)
        kind = np.float32 if accumulate_f32 else np.uint16
        out = np.lib.stride_tricks.as_strided(raw.view(kind), (m, n), (ldy * size, size))
        if accumulate_f32:
            out += product
        else:
            bits = product.view(np.uint32)
            out[:] = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16

    def _floats(self, what: str, address: int, rows: int, columns: int, ld: int) -> Any:
        raw = self._view(what, address, ((rows - 1) * ld + columns) * 2).view(np.uint16)
        bits = np.lib.stride_tricks.as_strided(raw, (rows, columns), (ld * 2, 2))
        return (bits.astype(np.uint32) << 16).view(np.float32)

    # ---- order ----------------------------------------------------------------------

    def record(self, timed: bool = True) -> Mark:
        """The present moment."""
        return EmulatedMark()

    def synchronize(self) -> None:
        """Do the copies that are under way."""
        self._copies.finish()

    def close(self) -> None:
        """Give all memory back."""
        self.synchronize()
        for window in self._windows:
            window.close()
        for address in list(self._sizes):
            self.release(address)
