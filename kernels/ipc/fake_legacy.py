"""The legacy transport without a GPU: handles that open inside one PID namespace, as the driver's.

Stands in for `kernels.ipc.cuda_legacy` where landlord and tenant are tested. A handle names a
descriptor of the process that made it, which another one opens through /proc: so it works between
any two processes of one user in one PID namespace, dies with its maker, and closing the maker's
memory frees nothing while it is open elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import struct

from kernels.errors import HandleError
from kernels.ipc.fake_physical import FakePhysical, FakeRegion
from kernels.ipc.legacy import HANDLE_BYTES, Ticket, pid_namespace
from kernels.ipc.physical import Transport

_NAMES = struct.Struct("<qq")  # process id, descriptor in it


class FakeLegacyRegion:
    """One allocation; `Region` of the protocol."""

    def __init__(self, region: FakeRegion, gpu_uuid: str) -> None:
        self.size_bytes = region.size_bytes
        self._gpu_uuid = gpu_uuid
        self._fd = region.export()  # the allocation itself: open as long as it is not freed
        region.close()

    def export(self) -> int:
        if self._fd < 0:
            raise HandleError("export", f"the region of {self.size_bytes:,} bytes is closed")
        handle = _NAMES.pack(os.getpid(), self._fd).ljust(HANDLE_BYTES, b"\0")
        return Ticket(handle, self.size_bytes, self._gpu_uuid, pid_namespace()).issue()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FakeLegacyPhysical:
    """A `Physical` that hands out tickets for the memory of a `FakePhysical`."""

    transport: Transport = "legacy_ipc"

    def __init__(self, memory: FakePhysical) -> None:
        self._memory = memory
        self.uuid, self.name = memory.uuid, memory.name
        self.total_bytes = memory.total_bytes
        self.granularity_bytes = memory.granularity_bytes

    def create(self, size_bytes: int) -> FakeLegacyRegion:
        return FakeLegacyRegion(self._memory.create(size_bytes), self.uuid)

    def used_bytes(self) -> int:
        return self._memory.used_bytes()

    def close(self) -> None:
        self._memory.close()


def open_handle(handle: bytes) -> int:
    """What an emulated device does with a handle: open the memory, counted as held by this process.

    Returns:
        A descriptor of the region, for `Window.map`.

    Raises:
        HandleError: no such process here, or it has freed the memory.
    """
    pid, fd = _NAMES.unpack_from(handle)
    try:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HandleError("legacy_ipc", f"the handle opens nothing here: {error}") from error
    fcntl.flock(opened, fcntl.LOCK_SH)
    return opened
