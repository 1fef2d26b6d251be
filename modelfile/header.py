"""Walk the header of a GGUF file: metadata and tensor table, straight from the mapped bytes.

Called by `modelfile.gguf_file`. Nothing is trusted: every length and count is compared with the
bytes that are left before anything is read or allocated, so a corrupt file costs an error, never
memory or time. A vocabulary of 150,000 strings is walked in about 0.1 s.

Refuses (ModelFileError): not a GGUF, versions other than 2 and 3, big-endian files, counts or
lengths that the file cannot hold, nested arrays, duplicate keys or tensors, unknown value or tensor
types, tensors that are unaligned, overlap, or end past the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelfile.ggml_types import GGML_TYPES, GgmlType
from skim.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_LENGTH = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Value type → (struct format, numpy dtype, bytes).
_SCALARS: dict[int, tuple[str, str, int]] = {
    0: ("<B", "<u1", 1),
    1: ("<b", "<i1", 1),
    2: ("<H", "<u2", 2),
    3: ("<h", "<i2", 2),
    4: ("<I", "<u4", 4),
    5: ("<i", "<i4", 4),
    6: ("<f", "<f4", 4),
    7: ("<?", "?", 1),
    10: ("<Q", "<u8", 8),
    11: ("<q", "<i8", 8),
    12: ("<d", "<f8", 8),
}


class StringArray:
    """An array of strings in the mapped file; `len()` is free, the strings are made on request."""

    def __init__(self, raw: memoryview, count: int) -> None:
        self.raw = raw
        self._count = count

    def __len__(self) -> int:
        return self._count

    def to_bytes(self) -> list[bytes]:
        """Read all entries, undecoded."""
        raw, position, entries = bytes(self.raw), 0, []  # slices of bytes are twice as quick
        length_at = _LENGTH.unpack_from
        for _ in range(self._count):
            start = position + 8
            position = start + length_at(raw, position)[0]
            entries.append(raw[start:position])
        return entries


Scalar = bool | int | float | str
MetadataValue = Scalar | StringArray | NDArray[np.generic]


class TensorInfo(NamedTuple):
    """One row of the tensor table.

    `shape` is in NumPy order (rows first, the reverse of ggml's), `offset` counts bytes from the
    start of the tensor data, `dtype` is ggml's name of the type, for example `Q8_0`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensor data, and where that starts (bytes from the file's start)."""

    version: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]
    data_offset: int


class _Walk:
    """A cursor over the file that refuses to read past its end."""

    def __init__(self, data: memoryview, name: str) -> None:
        self.data = data
        self.name = name
        self.position = 0

    def fail(self, problem: str, got: object = None, allowed: object = None) -> ModelFileError:
        return ModelFileError(f"{self.name}: {problem}", got=got, allowed=allowed)

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes and return where they start."""
        start, left = self.position, len(self.data) - self.position
        if size > left:
            raise self.fail(
                f"cut short or corrupt: {what} at byte {start} needs {size} bytes, {left} are left",
                got=f"{left} bytes",
                allowed=f">= {size} bytes",
            )
        self.position = start + size
        return start

    def u32(self, what: str) -> int:
        start = self.take(4, what)
        return int.from_bytes(self.data[start : start + 4], "little")

    def u64(self, what: str) -> int:
        start = self.take(8, what)
        return int.from_bytes(self.data[start : start + 8], "little")

    def count(self, what: str, smallest_bytes: int) -> int:
        """Read a count of items and refuse it when the file is too small to hold them."""
        value = self.u64(what)
        left = len(self.data) - self.position
        if value * smallest_bytes > left:
            raise self.fail(
                f"cut short or corrupt: {what} is {value}, but only {left} bytes are left",
                got=value,
                allowed=f"<= {left // smallest_bytes}",
            )
        return value

    def string(self, what: str) -> str:
        size = self.u64(f"length of {what}")
        start = self.take(size, what)
        raw = bytes(self.data[start : start + size])
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {start} is not UTF-8", got=raw[:32]) from error

    def value(self, key: str) -> MetadataValue:
        kind = self.u32(f"type of {key!r}")
        if kind == _STRING:
            return self.string(f"value of {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self.fail(f"{key!r} has an unknown value type", kind, "0 to 12")
        form, _, size = _SCALARS[kind]
        start = self.take(size, f"value of {key!r}")
        number: bool | int | float = struct.unpack_from(form, self.data, start)[0]
        return number

    def _array(self, key: str) -> MetadataValue:
        kind = self.u32(f"element type of {key!r}")
        what = f"number of entries of {key!r}"
        if kind == _STRING:
            count = self.count(what, 8)
            start = self.position
            self._skip_strings(count, key)
            return StringArray(self.data[start : self.position], count)
        if kind not in _SCALARS:
            raise self.fail(
                f"{key!r} is an array of unsupported elements", kind, "scalars, strings"
            )
        _, dtype, size = _SCALARS[kind]
        count = self.count(what, size)
        start = self.take(count * size, f"entries of {key!r}")
        return np.frombuffer(self.data, dtype=dtype, count=count, offset=start)

    def _skip_strings(self, count: int, key: str) -> None:
        # The hot loop of opening a model: no method calls, one comparison an entry.
        data, position, end = self.data, self.position, len(self.data)
        from_bytes = int.from_bytes
        for index in range(count):
            start = position + 8
            position = start + from_bytes(data[position:start], "little")
            if position > end:
                self.position = min(start, end)
                raise self.fail(
                    f"cut short or corrupt: entry {index} of {key!r} ends past the file"
                )
        self.position = position


def read_header(data: memoryview, name: str) -> Header:
    """Read and check the header of a whole GGUF file.

    Args:
        data: all bytes of the file.
        name: how errors call the file.
    Raises:
        ModelFileError: see the module's first lines.
    """
    walk = _Walk(data, name)
    magic = bytes(data[:4])
    if magic != MAGIC:
        raise walk.fail("is not a GGUF file", magic, MAGIC)
    walk.position = 4
    version = walk.u32("version")
    if version not in VERSIONS:
        raise walk.fail(f"has GGUF version {version}", version, VERSIONS)
    tensor_count = walk.count("number of tensors", 24)
    key_count = walk.count("number of metadata keys", 13)
    metadata: dict[str, MetadataValue] = {}
    for _ in range(key_count):
        key = walk.string("a metadata key")
        if key in metadata:
            raise walk.fail(f"metadata key {key!r} appears twice")
        metadata[key] = walk.value(key)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise walk.fail("general.alignment must be a power of two", alignment, "a power of two")
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        tensor = _tensor_info(walk, alignment)
        if tensor.name in tensors:
            raise walk.fail(f"tensor {tensor.name!r} appears twice")
        tensors[tensor.name] = tensor
    data_offset = -(-walk.position // alignment) * alignment
    _check_extents(walk, tensors, data_offset)
    return Header(version, metadata, tensors, data_offset)


def _tensor_info(walk: _Walk, alignment: int) -> TensorInfo:
    name = walk.string("a tensor name")
    dimensions = walk.u32(f"number of dimensions of {name!r}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise walk.fail(
            f"tensor {name!r} has {dimensions} dimensions", dimensions, f"1 to {MAX_DIMENSIONS}"
        )
    shape = [walk.u64(f"a dimension of {name!r}") for _ in range(dimensions)]
    kind, offset = walk.u32(f"type of {name!r}"), walk.u64(f"offset of {name!r}")
    dtype = GGML_TYPES.get(kind)
    if dtype is None:
        raise walk.fail(f"tensor {name!r} has an unknown type", kind, sorted(GGML_TYPES))
    if offset % alignment:
        raise walk.fail(
            f"tensor {name!r} is not aligned", offset, f"a multiple of {alignment} bytes"
        )
    size_bytes = _size_bytes(walk, name, shape, dtype)
    return TensorInfo(name, dtype.name, tuple(reversed(shape)), offset, size_bytes)


def _size_bytes(walk: _Walk, name: str, shape: list[int], dtype: GgmlType) -> int:
    values = 1
    for size in shape:
        values *= size
    if values <= 0 or values > 8 * len(walk.data) * dtype.block_size:
        raise walk.fail(f"tensor {name!r} has an absurd shape", shape, "a shape that fits the file")
    if shape[0] % dtype.block_size:
        raise walk.fail(
            f"rows of tensor {name!r} do not divide into {dtype.name} blocks",
            shape[0],
            f"a multiple of {dtype.block_size}",
        )
    return values // dtype.block_size * dtype.block_bytes


def _check_extents(walk: _Walk, tensors: dict[str, TensorInfo], data_offset: int) -> None:
    room = max(0, len(walk.data) - data_offset)
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise walk.fail(
                f"tensor {tensor.name!r} overlaps the one before it", tensor.offset, end
            )
        end = tensor.offset + tensor.size_bytes
        if end > room:
            raise walk.fail(
                f"cut short: tensor {tensor.name!r} ends at byte {end} of the tensor data, "
                f"the file has {room}",
                got=f"{room} bytes",
                allowed=f">= {end} bytes",
            )
