"""A GPU's physical memory through the driver's virtual memory calls, without a CUDA context.

The landlord's side: it creates, exports and releases (none of it needs a context, which would cost
524 MiB) and has NVML count the bytes, other processes' included. It never maps. The caller's thread
is any; one call at a time. Refuses a machine without a GPU, driver or NVML by NoDevice.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from cuda.bindings import driver

from kernels.cuda_calls import (
    FILE_DESCRIPTOR,
    OUT_OF_MEMORY,
    call,
    exportable_memory,
    granularity_of,
    open_gpu,
    uuid_of,
)
from kernels.errors import HandleError, NoDevice, OutOfMemory
from kernels.ipc.physical import Transport, check_size


class CudaRegion:
    """One physical allocation; `Region` of the protocol."""

    def __init__(self, size_bytes: int, handle: Any) -> None:
        self.size_bytes = size_bytes
        self._handle: Any = handle

    def export(self) -> int:
        if self._handle is None:
            raise HandleError("export", f"the region of {self.size_bytes:,} bytes is closed")
        result = driver.cuMemExportToShareableHandle(self._handle, FILE_DESCRIPTOR, 0)
        fd = int(call("export", result, HandleError))
        os.set_inheritable(fd, False)  # a child that inherits it would hold all the bytes
        return fd

    def close(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            call("release", driver.cuMemRelease(handle), HandleError)


class CudaPhysical:
    """The GPU `ordinal`; see `kernels.ipc.physical.Physical` for what each method promises.

    Args:
        ordinal: which GPU, as CUDA counts them.

    Raises:
        NoDevice: there is no such GPU, no driver, no NVML, or nvidia-ml-py is not installed.
    """

    transport: Transport = "vmm_fd"

    def __init__(self, ordinal: int = 0) -> None:
        gpu = open_gpu(ordinal)
        self.uuid = uuid_of(gpu)
        self.granularity_bytes = granularity_of(gpu)
        named = call("cuDeviceGetName", driver.cuDeviceGetName(128, gpu), NoDevice)
        self.name: str = named.split(b"\0")[0].decode()
        bus = call("cuDeviceGetPCIBusId", driver.cuDeviceGetPCIBusId(32, gpu), NoDevice)
        self._properties = exportable_memory(gpu)
        self._counter: _Counter | None = _Counter(bus.split(b"\0")[0].decode())
        self.total_bytes = self._memory()[1]

    def create(self, size_bytes: int) -> CudaRegion:
        check_size(size_bytes, self.granularity_bytes)
        status, handle = driver.cuMemCreate(size_bytes, self._properties, 0)
        if int(status) == OUT_OF_MEMORY:
            used, total = self._memory()
            raise OutOfMemory.of("create", size_bytes, total - used)
        return CudaRegion(size_bytes, call("create", (status, handle), HandleError))

    def used_bytes(self) -> int:
        return self._memory()[0]

    def close(self) -> None:
        if self._counter is not None:
            counter, self._counter = self._counter, None
            counter.close()

    def _memory(self) -> tuple[int, int]:
        if self._counter is None:
            raise NoDevice("used_bytes", "the GPU was closed")
        return self._counter.used_and_total_bytes()


class _Counter:
    """NVML of one GPU: 8 to 12 µs a question, no context."""

    def __init__(self, pci_bus: str) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise NoDevice(
                "nvml", f"nvidia-ml-py is not installed ({error}): pip install 'skim[gpu]'"
            ) from error
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise NoDevice("nvml", f"cannot be used to count memory: {error}") from error
        try:
            self._gpu = self._nvml.nvmlDeviceGetHandleByPciBusId(pci_bus)
        except self._nvml.NVMLError as error:
            self.close()
            raise NoDevice("nvml", f"does not know the GPU at {pci_bus}: {error}") from error

    def used_and_total_bytes(self) -> tuple[int, int]:
        """Bytes that cannot be had now, and all; what the driver keeps for itself is used."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._gpu)
        except self._nvml.NVMLError as error:
            raise NoDevice("nvml", f"the GPU does not say its memory: {error}") from error
        return int(memory.total) - int(memory.free), int(memory.total)

    def close(self) -> None:
        self._nvml.nvmlShutdown()
