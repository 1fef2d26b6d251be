"""Transport two: memory shared by a 64-byte handle, for drivers that export no descriptors.

The landlord (`kernels.ipc.cuda_legacy`) has a CUDA context and plain allocations; the tenant opens
a handle and gets an address that may be another one each time. A handle means something only inside
one PID namespace and on one GPU, so it travels in a *ticket*: a sealed memfd that also names both.
A ticket takes the place of a region's descriptor, so lease and landlord are the same for both
transports, and `SharedWindow` takes memory of either.

`cuMemFree` succeeds while a tenant still has the memory open, and frees nothing: the tenant closes
first, and the landlord counts bytes. Refuses a ticket of another namespace, GPU or size, or one
that is not exactly a ticket, before the driver is asked.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import dataclass

from kernels.device import Device, Memory, Window
from kernels.errors import HandleError
from kernels.ipc.physical import Transport

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
TICKET_BYTES = 512  # a ticket's fixed length: no region is so short, none so odd
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FIELDS = {"handle": str, "size_bytes": int, "gpu_uuid": str, "pid_namespace": int}


@dataclass(frozen=True)
class Ticket:
    """A handle, and where it means something.

    Attributes:
        handle: 64 bytes of the driver's.
        size_bytes: of the allocation.
        gpu_uuid: the GPU it lies on.
        pid_namespace: of the process that made the allocation; see `pid_namespace()`.
    """

    handle: bytes
    size_bytes: int
    gpu_uuid: str
    pid_namespace: int

    def issue(self) -> int:
        """Write it into a new sealed memfd; the caller sends that and closes it.

        Raises:
            HandleError: the host refuses.
        """
        fields = {**self.__dict__, "handle": self.handle.hex()}
        body = json.dumps(fields).encode().ljust(TICKET_BYTES)
        try:
            fd = os.memfd_create("skim-ticket", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise HandleError("ticket", f"cannot be created: {error}") from error
        try:
            os.write(fd, body)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(fd)
            raise HandleError("ticket", f"cannot be written: {error}") from error
        return fd

    @classmethod
    def read(cls, fd: int) -> Ticket:
        """Read one from a descriptor, which stays the caller's.

        Raises:
            HandleError: it holds anything else than one ticket.
        """
        try:
            found = json.loads(os.pread(fd, TICKET_BYTES, 0))
        except (OSError, ValueError, RecursionError) as error:
            raise HandleError("ticket", f"cannot be read: {error}") from error
        types = {n: type(v) for n, v in found.items()} if isinstance(found, dict) else {}
        try:
            handle = bytes.fromhex(found["handle"]) if types == _FIELDS else b""
        except ValueError:
            handle = b""
        if len(handle) != HANDLE_BYTES:
            allowed = f"{', '.join(_FIELDS)}, with a handle of {HANDLE_BYTES} bytes in hex"
            raise HandleError("ticket", f"must hold {allowed}, got {str(found)[:120]}")
        return cls(**{**found, "handle": handle})

    def check(self, *, size_bytes: int, gpu_uuid: str, namespace: int) -> None:
        """Refuse a handle that cannot be opened here.

        Args:
            size_bytes: what this side expects.
            gpu_uuid: of this side's GPU.
            namespace: `pid_namespace()` of this side.

        Raises:
            HandleError: says which of the three differs, and what to do.
        """
        if self.gpu_uuid != gpu_uuid:
            raise HandleError(
                "legacy_ipc",
                f"the memory lies on {self.gpu_uuid}, this process runs on {gpu_uuid}: "
                "give both processes the same GPU",
            )
        if self.pid_namespace != namespace:
            raise HandleError(
                "legacy_ipc",
                f"a handle opens inside one PID namespace only, the landlord's is "
                f"{self.pid_namespace}, this process's {namespace}: let both share one "
                "(shareProcessNamespace in a pod), or use the transport vmm_fd",
            )
        if self.size_bytes != size_bytes:
            raise HandleError(
                "legacy_ipc",
                f"the handle is of {self.size_bytes:,} bytes, expected {size_bytes:,}",
            )


def pid_namespace() -> int:
    """The number of this process's PID namespace, unique on the host; 0 where /proc hides it."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def is_ticket(fd: int) -> bool:
    """Whether a received descriptor is a ticket, and not the memory itself."""
    try:
        return os.fstat(fd).st_size == TICKET_BYTES and bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS))
    except OSError as error:
        if error.errno == errno.EBADF:
            raise HandleError("map", f"descriptor {fd} is not open") from error
        return False  # a device file: it has no seals


class SharedWindow:
    """Addresses for a landlord's memory, by whichever transport it comes; `Window` of the protocol.

    Memory of `vmm_fd` always appears at the addresses that were reserved once; that of `legacy_ipc`
    where the driver puts it: read `address` again after each `map`.

    Args:
        device: what maps it.
        size_bytes: of the region, rounded up as `Device.reserve` does.
    """

    def __init__(self, device: Device, size_bytes: int) -> None:
        self._device = device
        self._reserved: Window = device.reserve(size_bytes)
        self.size_bytes = self._reserved.size_bytes
        self._opened: Memory | None = None

    @property
    def address(self) -> int:
        """Where the memory is, or will be if it comes by descriptor."""
        return self._opened.address if self._opened else self._reserved.address

    @property
    def mapped(self) -> bool:
        """Whether there is memory at the address."""
        return self._opened is not None or self._reserved.mapped

    @property
    def transport(self) -> Transport:
        """By which transport the memory came, or would by default."""
        return "legacy_ipc" if self._opened else "vmm_fd"

    def map(self, fd: int) -> None:
        """Take a region's descriptor or ticket; it is closed in every case.

        Raises:
            HandleError: something is mapped already, or it cannot be opened here; says why.
        """
        try:
            ticket = Ticket.read(fd) if is_ticket(fd) else None
        except HandleError:
            _close(fd)
            raise
        if ticket is None:
            self._reserved.map(fd)
            return
        _close(fd)
        if self.mapped:
            raise HandleError("legacy_ipc", "the window holds memory already: unmap it first")
        ticket.check(
            size_bytes=self.size_bytes, gpu_uuid=self._device.uuid, namespace=pid_namespace()
        )
        self._opened = self._device.import_handle(ticket.handle, self.size_bytes)

    def unmap(self) -> None:
        """Let the memory go after all queued work; a second call does nothing."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.close()
        self._reserved.unmap()

    def close(self) -> None:
        """Unmap, and give the addresses back; a second call does nothing."""
        self.unmap()
        self._reserved.close()


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:  # it was not open: what reads it says so
        return
