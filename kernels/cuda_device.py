"""One GPU through cuda.core: memory, copies, launches, marks, tensor maps, products.

The `Device` that the drafter runs on; only it, the modules it is made of (`cuda_memory`,
`cuda_copies`, `compiler`, `gemm`, `ipc.window`) and the landlords of `kernels.ipc` import `cuda`.
Work is queued on one stream, copies of pinned memory on a second; calls may come from any thread,
one at a time. No managed memory. Every error of a launch carries the kernel's name; what fails
later, inside a kernel, is reported by the next call that waits, with the name of the last launch,
or by the launch itself if `check_each_launch`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from cuda.bindings import driver
from cuda.core import Device as Gpu
from cuda.core import EventOptions, LaunchConfig, ObjectCode, launch
from numpy.typing import NDArray

from kernels.compiler import SOURCES, Compiler, default_cache_dir
from kernels.cuda_calls import OUT_OF_MEMORY, call, open_gpu, uuid_of
from kernels.cuda_copies import CopyQueue, CudaPinned
from kernels.cuda_memory import CudaMemory, Staging, encode_tensor_map
from kernels.device import Arg, KernelSource, Mark, Pinned, TensorMap
from kernels.errors import InvalidArgument, KernelError, LaunchError, NoDevice, OutOfMemory
from kernels.gemm import WORKSPACE_BYTES, Gemm
from kernels.ipc.cuda_legacy import CudaImport
from kernels.ipc.window import CudaWindow
from kernels.specialisation import OLDEST_CAPABILITY, arch_of

_MAX_SHARED = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class _Inside(threading.local):
    """Whether the calling thread has the device's context; not its number, which is used again."""

    done = False


class CudaMark:
    """An event; `Mark` of the protocol."""

    def __init__(self, event: Any, last_launch: str, enter: Callable[[], None]) -> None:
        self.event, self._last_launch, self._enter = event, last_launch, enter

    def wait(self) -> None:
        self._enter()
        try:
            self.event.sync()
        except Exception as error:  # cuda.core's own tree is private
            raise _failed_later(self._last_launch, error) from error

    def seconds_since(self, earlier: Mark) -> float:
        self.wait()
        return float(self.event - cast(CudaMark, earlier).event) * 1e-3


class CudaDevice:
    """The GPU `ordinal`; see `kernels.device.Device` for what each method promises.

    Args:
        ordinal: which GPU, as CUDA counts them.
        cache_dir: where compiled kernels are kept; None keeps none.
        sources: the folder of the .cu files.
        check_each_launch: wait after every launch, so that a failure names its kernel. Slow.

    Raises:
        NoDevice: there is no such GPU, no driver, or the GPU is older than compute capability 8.0.
    """

    def __init__(
        self,
        ordinal: int = 0,
        *,
        cache_dir: Path | None = default_cache_dir(),  # noqa: B008 (a path, never changed)
        sources: Path = SOURCES,
        check_each_launch: bool = False,
    ) -> None:
        try:
            gpu = Gpu(ordinal)
            gpu.set_current()
            self._stream = gpu.create_stream()
        except Exception as error:  # cuda.core's own tree is private; all of it means: no GPU
            raise NoDevice("device", f"GPU {ordinal} cannot be used: {error}") from error
        major, minor = gpu.compute_capability
        if (major, minor) < OLDEST_CAPABILITY:
            oldest = "{}.{}".format(*OLDEST_CAPABILITY)
            found = f"{gpu.name} has compute capability {major}.{minor}"
            raise NoDevice("device", f"{found}, at least {oldest} is needed")
        self._context = call("cuCtxGetCurrent", driver.cuCtxGetCurrent())
        self._inside = _Inside()
        self._inside.done = True
        self._ordinal, self._gpu, self._handle = ordinal, gpu, open_gpu(ordinal)
        self.uuid = uuid_of(self._handle)
        self.name: str = gpu.name
        self.arch = arch_of(major, minor)
        self.num_sms: int = gpu.properties.multiprocessor_count
        self._most_shared_bytes: int = gpu.properties.max_shared_memory_per_block_optin
        self.total_bytes = self._memory_info()[1]
        self._compiler = Compiler(cache_dir, sources)
        self._check_each_launch = check_each_launch
        self._last_launch = "no launch"
        self._code: dict[tuple[str, tuple[tuple[str, int | str], ...]], ObjectCode] = {}
        self._kernels: dict[KernelSource, Any] = {}
        self._shared_bytes: dict[KernelSource, int] = {}  # permitted so far
        self._live: set[int] = set()
        self._shared: list[CudaWindow | CudaPinned | CudaImport] = []  # closed with the device
        self._copies: CopyQueue | None = None
        self._staging: Staging | None = None
        self._gemm: Gemm | None = None

    def free_bytes(self) -> int:
        self._enter()
        return self._memory_info()[0]

    def allocate(self, num_bytes: int) -> CudaMemory:
        self._enter()
        if num_bytes < 1:
            raise InvalidArgument.value("allocate", "num_bytes", num_bytes, "at least 1")
        status, address = driver.cuMemAlloc(num_bytes)
        if int(status) == OUT_OF_MEMORY:
            raise OutOfMemory.of("allocate", num_bytes, self._memory_info()[0])
        self._queued("allocate", (status,))
        self._live.add(int(address))
        return CudaMemory(int(address), num_bytes, self._release)

    def import_handle(self, handle: bytes, num_bytes: int) -> CudaImport:
        self._enter()
        opened = CudaImport(handle, num_bytes, self._enter, self.synchronize)
        self._shared = [*(part for part in self._shared if not part.closed), opened]
        return opened

    def reserve(self, size_bytes: int) -> CudaWindow:
        self._enter()
        window = CudaWindow(self._handle, size_bytes, self._enter, self.synchronize)
        self._shared = [*(part for part in self._shared if not part.closed), window]
        return window

    def pin(self, array: NDArray[np.uint8]) -> CudaPinned:
        self._enter()
        if self._copies is None:
            self._copies = CopyQueue(self._gpu)
        pinned = CudaPinned(array, self._enter, self._copies.synchronize)
        self._shared = [*(part for part in self._shared if not part.closed), pinned]
        return pinned

    def copy_in(
        self,
        address: int,
        pinned: Pinned,
        offset: int,
        num_bytes: int,
        *,
        after: Mark | None = None,
    ) -> CudaMark:
        self._enter()
        if num_bytes < 1:
            raise InvalidArgument.value("copy_in", "num_bytes", num_bytes, "at least 1")
        if self._copies is None or not isinstance(pinned, CudaPinned):
            raise InvalidArgument.value("copy_in", "pinned", pinned, "of this device's `pin`")
        source = pinned.address_of(offset, num_bytes)
        behind = None if after is None else cast(CudaMark, after).event
        event = self._copies.copy(address, source, num_bytes, behind)
        return CudaMark(event, "copy_in", self._enter)

    def wait_for(self, mark: Mark) -> None:
        self._enter()
        try:
            self._stream.wait(cast(CudaMark, mark).event)
        except Exception as error:  # cuda.core's own tree is private
            raise _failed_later(self._last_launch, error) from error

    def upload(self, address: int, array: NDArray[Any]) -> None:
        self._enter()
        if not array.flags.c_contiguous:
            raise InvalidArgument.value("upload", "array", array.strides, "C-contiguous")
        if array.size == 0:
            return
        if self._staging is None:
            self._staging = Staging(self._stream.handle)
        self._staging.upload(address, array.reshape(-1).view(np.uint8))

    def download(self, address: int, out: NDArray[Any]) -> None:
        self._enter()
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise InvalidArgument.value("download", "out", out.strides, "C-contiguous and writable")
        if out.size == 0:
            return
        self._queued(
            "download",
            driver.cuMemcpyDtoHAsync(out.ctypes.data, address, out.nbytes, self._stream.handle),
        )
        self._finish_work()

    def fill(self, address: int, num_bytes: int, byte: int = 0) -> None:
        self._enter()
        if not 0 <= byte <= 255:
            raise InvalidArgument.value("fill", "byte", byte, "in 0 to 255")
        if num_bytes > 0:
            self._queued(
                "fill", driver.cuMemsetD8Async(address, byte, num_bytes, self._stream.handle)
            )

    def launch(
        self,
        source: KernelSource,
        grid: tuple[int, ...],
        block: int,
        args: tuple[Arg, ...],
        *,
        shared_bytes: int = 0,
    ) -> None:
        self._enter()
        kernel = self._kernels.get(source)
        if kernel is None:
            kernel = self._kernels[source] = self._load(source)
        if shared_bytes > self._shared_bytes.get(source, 0):
            self._permit(source, kernel, shared_bytes)
        self._last_launch = str(source)
        given = (arg.handle if isinstance(arg, TensorMap) else arg for arg in args)
        try:
            launch(self._stream, _config(grid, block, shared_bytes), kernel, *given)
        except Exception as error:  # cuda.core's own tree is private
            raise LaunchError(
                str(source),
                f"launch of grid {grid}, block {block}, {shared_bytes} shared bytes and "
                f"{len(args)} arguments refused: {error}",
            ) from error
        if self._check_each_launch:
            self._finish_work()

    def tensor_map(
        self, address: int, shape: tuple[int, int], row_stride_bytes: int, box: tuple[int, int]
    ) -> TensorMap:
        self._enter()
        plain = TensorMap(address, shape, row_stride_bytes, box)
        try:
            handle = encode_tensor_map(address, shape, row_stride_bytes, box)
        except Exception as error:  # cuda.core's own tree is private
            raise LaunchError(
                "tensor_map",
                f"{shape} at {address:#x}, {row_stride_bytes} bytes a row, box {box}: {error}",
            ) from error
        return replace(plain, handle=handle)

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
        self._enter()
        if self._gemm is None:
            with ExitStack() as failed:
                workspace = self.allocate(WORKSPACE_BYTES)
                failed.callback(workspace.close)  # else each further try would take another one
                self._gemm = Gemm(int(self._stream.handle), workspace.address)
                failed.pop_all()
        self._last_launch = "gemm"
        self._gemm.run(
            x=x, w=w, y=y, m=m, n=n, k=k, ldx=ldx, ldy=ldy, accumulate_f32=accumulate_f32
        )
        if self._check_each_launch:
            self._finish_work()

    def record(self, timed: bool = True) -> CudaMark:
        self._enter()
        try:
            options = EventOptions(timing_enabled=timed, blocking_sync=not timed)
            event = self._stream.record(options=options)
        except Exception as error:  # cuda.core's own tree is private
            raise _failed_later(self._last_launch, error) from error
        return CudaMark(event, self._last_launch, self._enter)

    def synchronize(self) -> None:
        self._finish_work()
        if self._copies is not None:
            self._copies.synchronize()

    def _finish_work(self) -> None:
        """Wait for the work queue, not for the copies that it does not wait for."""
        self._enter()
        try:
            self._stream.sync()
        except Exception as error:  # cuda.core's own tree is private
            raise _failed_later(self._last_launch, error) from error

    def close(self) -> None:
        """See `Device.close`; also gives back what allocations, windows and pins are open."""
        self._enter()
        with ExitStack() as stack:  # the last one first, each whatever the others raise
            stack.callback(self._close_stream)
            if self._copies is not None:
                stack.callback(self._copies.close)
            stack.callback(self._code.clear)
            stack.callback(self._kernels.clear)
            for address in list(self._live):
                stack.callback(self._release, address)
            for part in (self._staging, self._gemm):
                if part is not None:
                    stack.callback(part.close)
            self._staging = self._gemm = None
            for shared in self._shared:
                stack.callback(shared.close)
            stack.callback(self.synchronize)

    def _close_stream(self) -> None:
        try:
            self._stream.close()
        except Exception as error:  # cuda.core's own tree is private
            raise _failed_later(self._last_launch, error) from error

    def _enter(self) -> None:
        """Make the context current in a thread that calls for the first time."""
        if not self._inside.done:
            call("cuCtxSetCurrent", driver.cuCtxSetCurrent(self._context))
            self._inside.done = True

    def _memory_info(self) -> tuple[int, int]:
        status, free, total = driver.cuMemGetInfo()
        call("cuMemGetInfo", (status,))
        return int(free), int(total)

    def _release(self, address: int) -> None:
        if address in self._live:
            self._enter()
            self._live.discard(address)
            self._queued("free", driver.cuMemFree(address))

    def _queued(self, what: str, result: tuple[Any, ...]) -> None:
        try:
            call(what, result)
        except LaunchError as error:
            raise LaunchError(what, f"{error}; the last launch was {self._last_launch}") from error

    def _load(self, source: KernelSource) -> Any:
        unit = (source.file, source.defines)
        try:
            if unit not in self._code:
                cubin = self._compiler.cubin(source, self.arch)
                self._code[unit] = ObjectCode.from_cubin(cubin, name=source.file)
            return self._code[unit].get_kernel(source.entry)
        except KernelError:
            raise
        except Exception as error:
            raise LaunchError(str(source), f"cannot be loaded on {self.arch}: {error}") from error

    def _permit(self, source: KernelSource, kernel: Any, shared_bytes: int) -> None:
        """Allow a kernel its dynamic shared memory; above 48 KiB, static included, CUDA asks."""
        allowed = self._most_shared_bytes
        if shared_bytes > allowed:
            raise LaunchError(
                str(source), f"asks for {shared_bytes} bytes of shared memory, allowed is {allowed}"
            )
        call(
            str(source),
            driver.cuKernelSetAttribute(
                _MAX_SHARED, shared_bytes, driver.CUkernel(int(kernel.handle)), self._ordinal
            ),
        )
        self._shared_bytes[source] = shared_bytes


def _failed_later(last_launch: str, error: Exception) -> LaunchError:
    return LaunchError(last_launch, f"this launch or work queued before it failed: {error}")


@functools.lru_cache(maxsize=4096)  # a pass launches the same few hundred shapes again and again
def _config(grid: tuple[int, ...], block: int, shared_bytes: int) -> LaunchConfig:
    return LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)
