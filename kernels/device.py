"""The only door to a GPU: what a device does for the rest of the project.

`kernels.ops` launches through it and `drafter_svc` keeps its memory in it; neither imports `cuda`.
`kernels.cuda_device.CudaDevice` is the real one; the tests have one that runs the same kernel
sources on the CPU. One device is one GPU and one queue of work, for one caller at a time, in any
thread: work is queued in the order of the calls, and only `download`, `synchronize`, `Mark.wait`
and letting memory go block. Beside it runs a copy queue, which `copy_in` alone fills: a mark orders
the two. Nothing here computes.

Memory of another process arrives as a file descriptor and is mapped behind a `Window`, whose
addresses stay while the memory comes and goes (`kernels.ipc` makes it and passes it on).

An argument of a kernel is a Python int (a 64-bit pointer or size), `numpy.int32` or `numpy.float32`
(a C `int` or `float`), or a `TensorMap` (a `const __grid_constant__` parameter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InvalidArgument


@dataclass(frozen=True)
class KernelSource:
    """One entry of one file of `kernels/cuda` under some defines: what is compiled and launched.

    Attributes:
        file: name of the source in `kernels/cuda`, such as `block_score.cu`.
        entry: its `extern "C"` name.
        defines: macros and their values, in the order in which they are given to the compiler.
    """

    file: str
    entry: str
    defines: tuple[tuple[str, int | str], ...] = ()

    def __str__(self) -> str:
        given = ",".join(f"{name}={value}" for name, value in self.defines)
        return f"{self.entry}[{given}]" if given else self.entry


@dataclass(frozen=True)
class TensorMap:
    """A two-dimensional bf16 matrix in device memory as the copy engine (TMA) sees it.

    Tiles arrive in shared memory with the 128-byte swizzle; elements outside the matrix are zero.

    Attributes:
        address: first element, 16-byte aligned.
        shape: rows, columns of the matrix.
        row_stride_bytes: from one row to the next, a multiple of 16, at least a row's bytes.
        box: rows (at most 256) and columns (at most 64, the swizzle's 128 bytes) of a tile.
        handle: what the device that made the map passes to a kernel.
    """

    address: int
    shape: tuple[int, int]
    row_stride_bytes: int
    box: tuple[int, int]
    handle: Any = None

    def __post_init__(self) -> None:
        (rows, columns), stride = self.shape, self.row_stride_bytes
        for name, ok, allowed in (
            ("address", self.address % 16 == 0, "a multiple of 16"),
            ("shape", rows >= 1 and columns >= 1, "at least one row and one column"),
            (
                "row_stride_bytes",
                stride % 16 == 0 and 2 * columns <= stride < 1 << 40,
                f"a multiple of 16, at least a row's {2 * columns} bytes",
            ),
            (
                "box",
                1 <= self.box[0] <= 256 and self.box[1] in (8, 16, 24, 32, 40, 48, 56, 64),
                "1 to 256 rows of 8 to 64 columns in steps of 8",
            ),
        ):
            if not ok:
                raise InvalidArgument.value("tensor_map", name, getattr(self, name), allowed)


Arg = int | np.int32 | np.float32 | TensorMap


class Memory(Protocol):
    """One allocation on a device."""

    @property
    def address(self) -> int:
        """Device pointer, 256-byte aligned."""
        ...

    @property
    def num_bytes(self) -> int:
        """The bytes that were asked for."""
        ...

    def close(self) -> None:
        """Give the bytes back after all queued work is done; a second call does nothing."""
        ...


class Mark(Protocol):
    """A recorded position in one of the device's two queues. Any thread may wait for it."""

    def wait(self) -> None:
        """Block the host until the device has reached the mark; LaunchError if work failed."""
        ...

    def seconds_since(self, earlier: Mark) -> float:
        """Device time from `earlier` to this mark; waits for this one. Both must be timed."""
        ...


class Window(Protocol):
    """Device addresses that are reserved once; memory comes and goes behind them."""

    @property
    def address(self) -> int:
        """First device address, 256-byte aligned; the same for the window's whole life."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes of the window, and of every region that is mapped into it."""
        ...

    @property
    def mapped(self) -> bool:
        """Whether there is memory behind the addresses; touching them without is an error."""
        ...

    def map(self, fd: int) -> None:
        """Put an exported region behind the addresses; readable and writable.

        Takes the descriptor: it is closed in every case, and nothing but the mapping holds the
        region afterwards.

        Raises:
            HandleError: the window is mapped or closed, the descriptor is no region, or the region
                has another size; nothing is mapped then.
        """
        ...

    def unmap(self) -> None:
        """Wait for all queued work, then let the region go; does nothing if none is mapped."""
        ...

    def close(self) -> None:
        """Unmap, and give the addresses up; a second call does nothing."""
        ...


class Pinned(Protocol):
    """Host memory that the copy engine reads at full speed."""

    @property
    def num_bytes(self) -> int:
        """Bytes that were pinned."""
        ...

    def close(self) -> None:
        """Wait for the copies out of it, then unpin it; a second call does nothing."""
        ...


class Device(Protocol):
    """One GPU with one queue of work and one of copies from the host."""

    @property
    def uuid(self) -> str:
        """Which GPU, such as `GPU-5ed0…`; the same in every process."""
        ...

    @property
    def name(self) -> str:
        """What the vendor calls it."""
        ...

    @property
    def arch(self) -> str:
        """What kernels are compiled for, such as `sm_90a` (see `kernels.specialisation`)."""
        ...

    @property
    def num_sms(self) -> int:
        """Multiprocessors."""
        ...

    @property
    def total_bytes(self) -> int:
        """Memory of the whole device."""
        ...

    def free_bytes(self) -> int:
        """Bytes that no process holds now."""
        ...

    def allocate(self, num_bytes: int) -> Memory:
        """Reserve at least one byte. Contents are undefined. OutOfMemory when it does not fit."""
        ...

    def import_handle(self, handle: bytes, num_bytes: int) -> Memory:
        """Open another process's allocation by its 64-byte handle; closing gives none of it back.

        Raises:
            HandleError: it cannot be opened in this process; says why.
        """
        ...

    def reserve(self, size_bytes: int) -> Window:
        """Reserve addresses, no memory, for at least one byte.

        The size is rounded up to the granularity of physical memory: `Window.size_bytes` is the
        size to ask a landlord for.
        """
        ...

    def pin(self, array: NDArray[np.uint8]) -> Pinned:
        """Pin the memory behind a C-contiguous uint8 array, which must outlive the result.

        A shared mapping, never a private one. A read-only array may be pinned (and copied from).

        Raises:
            HandleError: the host's memory cannot be pinned.
        """
        ...

    def copy_in(
        self,
        address: int,
        pinned: Pinned,
        offset: int,
        num_bytes: int,
        *,
        after: Mark | None = None,
    ) -> Mark:
        """Queue a copy on the copy queue, beside the work queue.

        Args:
            address: device memory that is written.
            pinned: what is read; it must not change before the mark is reached.
            offset: where reading begins, in bytes.
            num_bytes: at least 1.
            after: the copy waits, on the device, for this mark first; None: only for copies that
                were queued before it.

        Returns:
            A timed mark that is reached when the bytes have arrived.
        """
        ...

    def wait_for(self, mark: Mark) -> None:
        """Let the work that is queued from now on wait, on the device, for a mark of `copy_in`."""
        ...

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy of a C-contiguous host array; it may be changed once this returns."""
        ...

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Wait for the queued work, then fill a C-contiguous writable host array."""
        ...

    def fill(self, address: int, num_bytes: int, byte: int = 0) -> None:
        """Queue setting bytes to one value."""
        ...

    def launch(
        self,
        source: KernelSource,
        grid: tuple[int, ...],
        block: int,
        args: tuple[Arg, ...],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """Queue one kernel; the first launch of a source compiles it.

        Args:
            source: what runs.
            grid: blocks in x, y, z; one to three sizes.
            block: threads in a block.
            args: in the order of the entry's parameters.
            shared_bytes: dynamic shared memory of a block.

        Raises:
            CompileError: the source does not compile for this architecture.
            LaunchError: the launch was refused, or earlier work failed.
        """
        ...

    def tensor_map(
        self, address: int, shape: tuple[int, int], row_stride_bytes: int, box: tuple[int, int]
    ) -> TensorMap:
        """Describe a bf16 matrix for the copy engine; limits as in `TensorMap`."""
        ...

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
        """Queue Y[m, n] = X[m, k] W[n, k]^T, bf16 in, fp32 sums; row-major, W contiguous.

        Args:
            x: bf16 matrix, rows `ldx` elements apart.
            w: bf16 matrix, rows `k` elements apart.
            y: bf16 matrix, rows `ldy` elements apart; float32 and added to if `accumulate_f32`.
            m: rows of X and Y.
            n: rows of W, columns of Y.
            k: columns of X and W.
            ldx: at least k.
            ldy: at least n.
            accumulate_f32: Y is float32 and Y += X W^T.
        """
        ...

    def record(self, timed: bool = True) -> Mark:
        """Queue a mark behind all work so far.

        Args:
            timed: marks can be subtracted; waiting for one that is not leaves the core to others.
        """
        ...

    def synchronize(self) -> None:
        """Block until all queued work and copies are done; LaunchError if any failed."""
        ...

    def close(self) -> None:
        """Finish the queued work and let the GPU go; allocations die with the device."""
        ...
