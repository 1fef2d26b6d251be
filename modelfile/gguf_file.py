"""Open a GGUF model file: metadata, tensor table, tensor bytes and values, digests.

The door of this package: tokenizer, chat template and shape are read from a `GgufFile`. The file is
mapped, never loaded: opening one costs the walk of its header, whatever its size. Refuses
what `modelfile.header` refuses, always with a ModelFileError that names the file.
"""

from __future__ import annotations

import hashlib
import mmap
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from modelfile.header import Header, MetadataValue, StringArray, TensorInfo, read_header
from skim.errors import ModelFileError

# model_digest: this many samples of this many bytes of the tensor data, evenly spaced.
DIGEST_SAMPLES = 64
DIGEST_SAMPLE_BYTES = 64 * 1024


class GgufFile:
    """A mapped GGUF file.

    Attributes:
        path: the file.
        size_bytes: of the whole file.
        metadata: key → bool, int, float, str, numeric array or StringArray. Arrays lie in the map.
        tensors: name → TensorInfo, in file order.
        data_offset: where the tensor data starts, bytes from the start of the file.

    Close it (or use `with`) when done. Arrays and views that it handed out keep the map alive.
    """

    def __init__(self, path: Path, data: memoryview, header: Header) -> None:
        self.path = path
        self.size_bytes = len(data)
        self.version = header.version
        self.metadata: dict[str, MetadataValue] = header.metadata
        self.tensors: dict[str, TensorInfo] = header.tensors
        self.data_offset = header.data_offset
        self._data: memoryview | None = data

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map a file and read its header.

        Raises:
            ModelFileError: the file is missing, unreadable, not a GGUF, cut short or corrupt.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size == 0:
                    raise ModelFileError(f"{path}: is empty", got="0 bytes", allowed="a GGUF file")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(
                f"{path}: cannot be read: {error.strerror}", got=str(path), allowed="a GGUF file"
            ) from error
        data = memoryview(mapped)
        return cls(path, data, read_header(data, str(path)))

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the map; it is unmapped once no array of it is in use. Idempotent."""
        self._data = None
        self.metadata = {}

    @property
    def data(self) -> memoryview:
        """All bytes of the file, read-only."""
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        return self._data

    def text(self, key: str, default: str | None = None) -> str:
        """Read a string; a missing key gives `default`, or a ModelFileError when that is None."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Read an integer; see `text`."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "an integer")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Read a size, 1 to 2^31 - 1; of a per-layer array, its maximum; see `text`."""
        value = self.metadata.get(key)
        if isinstance(value, np.ndarray) and value.size:
            size = int(self.integers(key).max())
        else:
            size = self.integer(key, default)
        if not 1 <= size < 2**31:
            raise self._wrong(key, size, "1 to 2^31 - 1")
        return size

    def number(self, key: str, default: float | None = None) -> float:
        """Read a finite number; see `text`."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Read a boolean; see `text`."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "a boolean")
        return value

    def strings(self, key: str) -> StringArray:
        """Read an array of strings, still in the map."""
        value = self.metadata.get(key)
        if not isinstance(value, StringArray):
            raise self._wrong(key, value, "an array of strings")
        return value

    def integers(self, key: str) -> NDArray[np.int64]:
        """Read an array of integers as int64."""
        value = self.metadata.get(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self._wrong(key, value, "an array of integers")
        return value.astype(np.int64)

    def _wrong(self, key: str, value: object, allowed: str) -> ModelFileError:
        if value is None:
            return ModelFileError(
                f"{self.path}: metadata key {key!r} is missing", got="nothing", allowed=allowed
            )
        got = type(value).__name__ if isinstance(value, StringArray | np.ndarray) else repr(value)
        return ModelFileError(
            f"{self.path}: metadata key {key!r} must be {allowed}, got {got}",
            got=got,
            allowed=allowed,
        )

    def info(self, name: str) -> TensorInfo:
        """Find one tensor's row of the table, or raise ModelFileError."""
        found = self.tensors.get(name)
        if found is None:
            raise ModelFileError(
                f"{self.path}: tensor {name!r} is missing",
                got="nothing",
                allowed=f"one of {len(self.tensors)} tensors",
            )
        return found

    def tensor_bytes(self, name: str) -> memoryview:
        """Give a tensor's bytes as they are in the file: read-only, not copied."""
        info = self.info(name)
        start = self.data_offset + info.offset
        return self.data[start : start + info.size_bytes]

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read a tensor as float32 in its NumPy shape (rows first).

        F32 comes as a read-only view of the map, everything else as a fresh dequantised array.

        Raises:
            ModelFileError: no such tensor, or a type that cannot be dequantised.
        """
        info = self.info(name)
        raw = np.frombuffer(self.tensor_bytes(name), dtype=np.uint8)
        if info.dtype == "F32":
            return raw.view("<f4").reshape(info.shape)
        from gguf import GGMLQuantizationType  # 0.3 s: paid only by who needs values
        from gguf.quants import dequantize

        try:
            rows = raw.reshape(*info.shape[:-1], -1)
            values = dequantize(rows, GGMLQuantizationType[info.dtype])
        except (NotImplementedError, ValueError, KeyError) as error:
            raise ModelFileError(
                f"{self.path}: tensor {name!r} of type {info.dtype} cannot be dequantised",
                got=info.dtype,
                allowed="F32, F16, BF16, Q8_0 and the other types that gguf dequantises",
            ) from error
        return np.ascontiguousarray(values, dtype=np.float32).reshape(info.shape)

    @cached_property
    def model_digest(self) -> str:
        """Hash what makes this model this model: sha256, 64 hex digits.

        Over the bytes before the tensor data, the file's size (8 bytes, little-endian), and 64
        evenly spaced samples of 64 KiB of the tensor data (all of it when it is no larger than
        the samples together): all of a 16 GB file would take 10 s at each start, and none of it
        would take a retrained model of the same shape for the old one.
        """
        data, start = self.data, self.data_offset
        digest = hashlib.sha256(data[:start])
        digest.update(self.size_bytes.to_bytes(8, "little"))
        room = max(0, self.size_bytes - start)
        if room <= DIGEST_SAMPLES * DIGEST_SAMPLE_BYTES:
            digest.update(data[start:])
            return digest.hexdigest()
        last = room - DIGEST_SAMPLE_BYTES
        for sample in range(DIGEST_SAMPLES):
            begin = start + last * sample // (DIGEST_SAMPLES - 1)
            digest.update(data[begin : begin + DIGEST_SAMPLE_BYTES])
        return digest.hexdigest()

    @cached_property
    def layout_digest(self) -> str:
        """Hash the tensor table (name, dtype, shape, offset), in file order: sha256 in hex."""
        digest = hashlib.sha256()
        for name, dtype, shape, offset, _ in self.tensors.values():
            digest.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0{offset}\n".encode())
        return digest.hexdigest()
