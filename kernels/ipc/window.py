"""Device addresses whose memory comes from another process, on a GPU: the tenant's side.

`CudaDevice.reserve` makes them. The descriptor is closed right after the import and the handle is
released right after the mapping, since each would hold the whole region after `unmap`. Refuses to
map twice, and everything that is no exported region of the window's size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from cuda.bindings import driver

from kernels.cuda_calls import FILE_DESCRIPTOR, call, granularity_of
from kernels.errors import HandleError, InvalidArgument


class CudaWindow:
    """Reserved addresses; `Window` of the protocol.

    Args:
        gpu: the driver's handle.
        size_bytes: at least 1; rounded up to the GPU's granularity.
        enter: makes the device's context current in the calling thread.
        synchronize: waits for all queued work and copies.
    """

    def __init__(
        self,
        gpu: Any,
        size_bytes: int,
        enter: Callable[[], None],
        synchronize: Callable[[], None],
    ) -> None:
        if size_bytes < 1:
            raise InvalidArgument.value("reserve", "size_bytes", size_bytes, "at least 1")
        granularity = granularity_of(gpu)
        self.size_bytes = -(-size_bytes // granularity) * granularity
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._access.location.id = int(gpu)
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._enter, self._synchronize = enter, synchronize
        result = driver.cuMemAddressReserve(self.size_bytes, 0, 0, 0)
        self.address = int(call("reserve", result, HandleError))
        self.mapped = False
        self.closed = False

    def map(self, fd: int) -> None:
        try:
            self._enter()
            if self.mapped or self.closed:
                state = "closed" if self.closed else "mapped already"
                raise HandleError("map", f"the window is {state}")
            handle = _import(fd)
        finally:
            with suppress(OSError):  # was no descriptor, which the import has said
                os.close(fd)
        with ExitStack() as stack:
            stack.callback(lambda: call("release", driver.cuMemRelease(handle), HandleError))
            self._put(handle)

    def _put(self, handle: Any) -> None:
        result = driver.cuMemMap(self.address, self.size_bytes, 0, handle, 0)
        try:
            call("map", result, HandleError)
        except HandleError as error:
            raise HandleError("map", f"no region of {self.size_bytes:,} bytes: {error}") from error
        try:
            result = driver.cuMemSetAccess(self.address, self.size_bytes, [self._access], 1)
            call("set access", result, HandleError)
        except HandleError:
            driver.cuMemUnmap(self.address, self.size_bytes)
            raise
        self.mapped = True

    def unmap(self) -> None:
        if not self.mapped:
            return
        self._enter()
        try:
            self._synchronize()
        finally:  # after a failed kernel too: the landlord waits for the bytes
            result = driver.cuMemUnmap(self.address, self.size_bytes)
            call("unmap", result, HandleError)
            self.mapped = False

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        with ExitStack() as stack:
            stack.callback(self._free_addresses)
            self.unmap()

    def _free_addresses(self) -> None:
        result = driver.cuMemAddressFree(self.address, self.size_bytes)
        call("free addresses", result, HandleError)


def _import(fd: int) -> Any:
    if fd < 0:
        raise HandleError("map", f"descriptor {fd} is no exported region")
    result = driver.cuMemImportFromShareableHandle(fd, FILE_DESCRIPTOR)
    try:
        return call("import", result, HandleError)
    except HandleError as error:
        raise HandleError("map", f"descriptor {fd} is no exported region: {error}") from error
