"""The legacy transport on a GPU: plain allocations and their 64-byte handles (`cuIpc*`).

`CudaLegacyPhysical` is the landlord's side; unlike `kernels.ipc.cuda_physical` it needs a CUDA
context, about half a GiB of the GPU. `CudaImport` is the tenant's side, for `CudaDevice`. Freeing
an allocation succeeds while a tenant has it open and frees nothing, so bytes are counted here as
there. Refuses nothing itself: the driver's refusals become sentences.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from cuda.bindings import driver

from kernels.cuda_calls import OUT_OF_MEMORY, call, open_gpu
from kernels.errors import HandleError, NoDevice, OutOfMemory
from kernels.ipc.cuda_physical import CudaPhysical
from kernels.ipc.legacy import HANDLE_BYTES, Ticket, pid_namespace
from kernels.ipc.physical import Transport, check_size

_LAZILY = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
_WHY = {  # what a refusal to open means where it was tried, by the driver's status
    1: "the memory was freed, or these processes were given the GPU in different ways",
    201: "the landlord is gone, or lives in another PID namespace",
    205: "the processes run as different users, or the landlord is gone",
}


class CudaLegacyRegion:
    """One allocation; `Region` of the protocol."""

    def __init__(self, owner: CudaLegacyPhysical, address: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._owner, self._address = owner, address

    def export(self) -> int:
        """A ticket for the allocation: see `kernels.ipc.legacy`."""
        if not self._address:
            raise HandleError("export", f"the region of {self.size_bytes:,} bytes is closed")
        self._owner.enter()
        found = call("cuIpcGetMemHandle", driver.cuIpcGetMemHandle(self._address), HandleError)
        handle = ctypes.string_at(found.getPtr(), HANDLE_BYTES)
        return Ticket(handle, self.size_bytes, self._owner.uuid, pid_namespace()).issue()

    def close(self) -> None:
        if self._address:
            address, self._address = self._address, 0
            self._owner.enter()
            call("cuMemFree", driver.cuMemFree(address), HandleError)


class CudaLegacyPhysical:
    """One GPU as a landlord with a context sees it; `Physical` of the protocol.

    Args:
        ordinal: which GPU.

    Raises:
        NoDevice: there is no such GPU, no driver, or no room for a context.
    """

    transport: Transport = "legacy_ipc"

    def __init__(self, ordinal: int = 0) -> None:
        self._gpu = CudaPhysical(ordinal)
        self.uuid, self.name = self._gpu.uuid, self._gpu.name
        self.total_bytes = self._gpu.total_bytes
        self.granularity_bytes = self._gpu.granularity_bytes
        self._handle = open_gpu(ordinal)
        try:
            retained = driver.cuDevicePrimaryCtxRetain(self._handle)
            self._context = call("cuDevicePrimaryCtxRetain", retained, NoDevice)
        except NoDevice:
            self._gpu.close()
            raise

    def enter(self) -> None:
        """Make the context current in the calling thread."""
        call("cuCtxSetCurrent", driver.cuCtxSetCurrent(self._context), HandleError)

    def create(self, size_bytes: int) -> CudaLegacyRegion:
        check_size(size_bytes, self.granularity_bytes)
        self.enter()
        status, address = driver.cuMemAlloc(size_bytes)
        if int(status) == OUT_OF_MEMORY:
            raise OutOfMemory.of("create", size_bytes, self.total_bytes - self.used_bytes())
        call("cuMemAlloc", (status,), HandleError)
        region = CudaLegacyRegion(self, int(address), size_bytes)
        try:  # as new physical memory is: nothing of another process is ever seen
            call("cuMemsetD8", driver.cuMemsetD8(address, 0, size_bytes), HandleError)
            call("cuCtxSynchronize", driver.cuCtxSynchronize(), HandleError)
        except HandleError:
            region.close()
            raise
        return region

    def used_bytes(self) -> int:
        return self._gpu.used_bytes()

    def close(self) -> None:
        """See `Physical.close`; a second call does nothing."""
        if self._context is not None:
            self._context = None
            try:
                released = driver.cuDevicePrimaryCtxRelease(self._handle)
                call("cuDevicePrimaryCtxRelease", released, HandleError)
            finally:
                self._gpu.close()


class CudaImport:
    """An allocation of another process, opened in the current context; `Memory` of the protocol.

    Args:
        handle: 64 bytes of `cuIpcGetMemHandle`.
        num_bytes: of the allocation.
        enter: makes the device's context current in the calling thread.
        synchronize: waits for all queued work and copies.

    Raises:
        HandleError: the driver refuses; says what that means.
    """

    def __init__(
        self,
        handle: bytes,
        num_bytes: int,
        enter: Callable[[], None],
        synchronize: Callable[[], None],
    ) -> None:
        if len(handle) != HANDLE_BYTES:
            raise HandleError("legacy_ipc", f"a handle has {HANDLE_BYTES} bytes, got {len(handle)}")
        self._enter, self._synchronize = enter, synchronize
        given = driver.CUipcMemHandle()
        ctypes.memmove(given.getPtr(), handle, HANDLE_BYTES)
        status, address = driver.cuIpcOpenMemHandle(given, _LAZILY)
        if int(status) != 0:
            why = _WHY.get(int(status), "the driver gives no reason")
            raise HandleError("legacy_ipc", f"the handle does not open: {status.name}: {why}")
        self.address, self.num_bytes = int(address), num_bytes
        self.closed = False

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._enter()
        try:
            self._synchronize()
        finally:  # after a failed kernel too: the landlord waits for the bytes
            result = driver.cuIpcCloseMemHandle(self.address)
            call("cuIpcCloseMemHandle", result, HandleError)
