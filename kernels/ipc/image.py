"""The host's copy of a region: a memfd with the same bytes, passed by descriptor, mapped shared.

The landlord creates it, the first tenant writes it, the landlord checks and seals it, and every
later tenant maps it read-only and copies from it to the GPU. Always `MAP_SHARED`: the driver copies
the pages of a private mapping, or never comes back. Refuses descriptors that are no image.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from kernels.errors import HandleError, InvalidArgument

CHUNK_BYTES = 16 << 20
_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # reading past a shrunk end is a SIGBUS
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python 3.11 has no name for it


def create_image(size_bytes: int) -> int:
    """A new image, all zero, of a size that nobody can change; the caller closes the descriptor.

    Raises:
        InvalidArgument: `size_bytes` is not positive.
        HandleError: the host refuses.
    """
    if size_bytes < 1:
        raise InvalidArgument.value("image", "size_bytes", size_bytes, "at least 1")
    try:
        fd = os.memfd_create("skim-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise HandleError("image", f"cannot be created: {error}") from error
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_SIZE)
    except (OSError, OverflowError) as error:
        os.close(fd)
        raise HandleError("image", f"cannot be {size_bytes:,} bytes long: {error}") from error
    return fd


class Image:
    """A mapped image.

    Attributes:
        size_bytes: its size.
        bytes_: uint8 [size_bytes] over the shared mapping; read-only if opened so.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self.size_bytes = len(mapping)
        self.bytes_: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)

    def close(self) -> None:
        """Let the mapping go; it ends with the last view of `bytes_` that somebody still has."""
        self.bytes_ = np.empty(0, np.uint8)


def open_image(fd: int, writable: bool) -> Image:
    """Map a whole image; the descriptor stays the caller's and may be closed at once.

    Args:
        fd: a descriptor of `create_image`.
        writable: False for an image that is copied from.

    Raises:
        HandleError: it is no image, it is empty, or it is sealed and `writable` was asked.
    """
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        size_bytes = os.fstat(fd).st_size
        return Image(mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, access))
    except (OSError, ValueError) as error:
        how = "writable" if writable else "read-only"
        raise HandleError("image", f"cannot be mapped {how}: {error}") from error


def seal_image(fd: int) -> None:
    """Fix the content: from now on nobody maps the image writable or writes to it.

    A writable mapping that exists stays one (a tenant may have it pinned, and it is as trusted as
    the landlord); so its owner closes it first. A second call does nothing.

    Raises:
        HandleError: the descriptor is no image.
    """
    seals = _FIXED_SIZE | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) != seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        raise HandleError("image", f"descriptor {fd} is no image: {error}") from error


def checksum(array: NDArray[np.uint8]) -> str:
    """sha256 of the bytes, hexadecimal; other threads run meanwhile.

    Raises:
        InvalidArgument: `array` is not C-contiguous uint8.
    """
    if array.dtype != np.uint8 or not array.flags.c_contiguous:
        got = f"{array.dtype} with strides {array.strides}"
        raise InvalidArgument.value("checksum", "array", got, "C-contiguous uint8")
    flat, digest = array.reshape(-1).data, hashlib.sha256()
    for begin in range(0, len(flat), CHUNK_BYTES):
        digest.update(flat[begin : begin + CHUNK_BYTES])
    return digest.hexdigest()
