"""Physical memory of one GPU as its landlord sees it: made, exported and counted, never mapped.

`kernels.ipc.cuda_physical` is the GPU, without a CUDA context; `kernels.ipc.fake_physical` does the
same with memfds, so that the same landlord runs where there is no GPU. A region's bytes are back
when nobody holds it any more: not this handle, not an exported descriptor, open or unread in a
socket, not an importer's handle, not a mapping. So bytes are counted, never inferred.
"""

from __future__ import annotations

from typing import Literal, Protocol

from kernels.errors import InvalidArgument, NoDevice

Transport = Literal["vmm_fd", "legacy_ipc"]  # how regions travel; see `kernels.ipc.legacy`


class Region(Protocol):
    """One allocation of physical memory."""

    @property
    def size_bytes(self) -> int:
        """Its size, a multiple of the granularity."""
        ...

    def export(self) -> int:
        """A new file descriptor of the region, for another process.

        The caller sends it and closes it at once: an open one holds all the bytes.

        Raises:
            HandleError: the region is closed, or the driver refuses.
        """
        ...

    def close(self) -> None:
        """Let this handle go; a second call does nothing. Who else holds the region keeps it."""
        ...


class Physical(Protocol):
    """One GPU; calls may come from any thread, one at a time."""

    @property
    def transport(self) -> Transport:
        """By what a region is passed: its own descriptor, or a ticket with a handle."""
        ...

    @property
    def uuid(self) -> str:
        """Which GPU, such as `GPU-5ed0…`; equal to `Device.uuid` in another process."""
        ...

    @property
    def name(self) -> str:
        """What the vendor calls it."""
        ...

    @property
    def total_bytes(self) -> int:
        """Memory of the whole device."""
        ...

    @property
    def granularity_bytes(self) -> int:
        """Regions are multiples of it."""
        ...

    def create(self, size_bytes: int) -> Region:
        """Take physical memory; its content is zero.

        Raises:
            InvalidArgument: `size_bytes` is not a positive multiple of `granularity_bytes`.
            OutOfMemory: it does not fit; the message says what is free.
        """
        ...

    def used_bytes(self) -> int:
        """Bytes of the whole device that any process holds now, measured."""
        ...

    def close(self) -> None:
        """Let the GPU go. Regions are closed by who made them."""
        ...


def check_size(size_bytes: int, granularity_bytes: int) -> None:
    """InvalidArgument unless `size_bytes` is a positive multiple of the granularity."""
    if size_bytes < 1 or size_bytes % granularity_bytes:
        raise InvalidArgument.value(
            "create", "size_bytes", size_bytes, f"a positive multiple of {granularity_bytes:,}"
        )


def open_physical(ordinal: int = 0, transport: Transport = "vmm_fd") -> Physical:
    """The physical memory of a GPU, as CUDA counts GPUs.

    Raises:
        NoDevice: there is no such GPU, or what it needs is not installed; says why.
    """
    try:
        from kernels.ipc.cuda_legacy import CudaLegacyPhysical
        from kernels.ipc.cuda_physical import CudaPhysical
    except ImportError as error:
        why = f"cuda-python is not installed ({error}): pip install 'skim[gpu]'"
        raise NoDevice("device", why) from error
    return CudaPhysical(ordinal) if transport == "vmm_fd" else CudaLegacyPhysical(ordinal)
