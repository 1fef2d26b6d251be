"""A GPU's physical memory without a GPU: regions are memory files, counted as a driver counts.

Stands in for `kernels.ipc.cuda_physical` where the landlord is tested. `export` opens a new file
description and takes a shared lock (flock) on it. The lock lives as long as that description does:
an open descriptor anywhere, one unread in a socket and a mapping each keep it, as each keeps a
region's bytes on a GPU. A region is free when an exclusive lock on it is granted.

With a `folder` the regions are files there, and every process that opens the same folder counts
the same bytes, those of a process that was killed included; without one they are memfds of this
process. Refuses what the driver refuses, by the same errors.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from kernels.errors import HandleError, OutOfMemory
from kernels.ipc.physical import Transport, check_size

FAKE_UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"
GRANULARITY_BYTES = 2 << 20  # as on every GPU of today
REGION_MODE = 0o600


class FakeRegion:
    """One region; `Region` of the protocol."""

    def __init__(self, size_bytes: int, unlocked_fd: int) -> None:
        self.size_bytes = size_bytes
        self._unlocked_fd = unlocked_fd  # asks for the exclusive lock, takes no shared one
        self._handle_fd = _locked(unlocked_fd)

    def export(self) -> int:
        if self._handle_fd < 0:
            raise HandleError("export", f"the region of {self.size_bytes:,} bytes is closed")
        return _locked(self._handle_fd)

    def close(self) -> None:
        if self._handle_fd >= 0:
            os.close(self._handle_fd)
            self._handle_fd = -1

    def forget_if_free(self) -> bool:
        """Whether nobody holds the region any more; then its memory is given back."""
        if not _is_free(self._unlocked_fd):
            return False
        os.close(self._unlocked_fd)
        self._unlocked_fd = -1
        return True


class FakePhysical:
    """So many bytes that behave like a GPU's; see `kernels.ipc.physical.Physical`.

    Args:
        total_bytes: what the device has.
        uuid: which GPU it is; the emulated device has the same by default.
        folder: where regions lie as files, for several processes; None: memfds of this process.
    """

    transport: Transport = "vmm_fd"
    name = "fake GPU"
    granularity_bytes = GRANULARITY_BYTES

    def __init__(
        self, total_bytes: int, uuid: str = FAKE_UUID, *, folder: Path | None = None
    ) -> None:
        self.total_bytes, self.uuid = total_bytes, uuid
        self._folder = folder
        self._regions: list[FakeRegion] = []
        self._made = 0
        self._lock = threading.Lock()

    def create(self, size_bytes: int) -> FakeRegion:
        check_size(size_bytes, self.granularity_bytes)
        with self._lock:
            free = self.total_bytes - self._count()
            if size_bytes > free:
                raise OutOfMemory.of("create", size_bytes, free)
            region = self._new_file(size_bytes) if self._folder else _new_memfd(size_bytes)
            self._regions.append(region)
            return region

    def used_bytes(self) -> int:
        with self._lock:
            return self._count()

    def close(self) -> None:
        """See `Physical.close`; what is held no more is given back."""
        self.used_bytes()

    def _count(self) -> int:
        self._regions = [region for region in self._regions if not region.forget_if_free()]
        if self._folder is None:
            return sum(region.size_bytes for region in self._regions)
        return sum(map(_bytes_of_file, self._folder.glob("*.region")))

    def _new_file(self, size_bytes: int) -> FakeRegion:
        """A file that appears under its name only when it is locked."""
        assert self._folder is not None
        self._made += 1
        path = self._folder / f"{os.getpid()}-{id(self):x}-{self._made}.new"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, REGION_MODE)
        os.ftruncate(fd, size_bytes)
        region = FakeRegion(size_bytes, fd)
        path.rename(path.with_suffix(".region"))
        return region


def _new_memfd(size_bytes: int) -> FakeRegion:
    fd = os.memfd_create("skim-region", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    return FakeRegion(size_bytes, fd)


def _locked(fd: int) -> int:
    """A new file description of the same file that holds a shared lock."""
    opened = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(opened, fcntl.LOCK_SH)
    return opened


def _is_free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _bytes_of_file(path: Path) -> int:
    """What a file of the folder holds: its size, or nothing and its end when nobody holds it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # another process has just ended it
        return 0
    try:
        if not _is_free(fd):
            return os.fstat(fd).st_size
        path.unlink(missing_ok=True)
        return 0
    finally:
        os.close(fd)
