"""Length-prefixed frames between the service process and its engine child.

A frame is a fixed head, a JSON object with a message's scalars, and its raw arrays in field order,
so a prompt of 131,072 ids crosses as one copy. Refuses short, forged, oversized and ill-typed
frames with FrameError; the reader then drops the connection, since a byte stream that lost its
place cannot be trusted again. Pure: no I/O, no llama_cpp. The messages are in `messages.py`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from skim.errors import EngineFault
from target_svc.messages import Float32s, FromEngine, Int32s, Message, ToEngine

MAGIC = b"SkE1"
HEAD = struct.Struct("<4sBxxxII")  # magic, kind, bytes of JSON, bytes of arrays
# A prompt of 2 Mi tokens (ids, positions, original ids) is 24 MiB: room for it, none for a forgery.
MAX_JSON_BYTES = 1 << 20
MAX_ARRAY_BYTES = 64 << 20


class FrameError(EngineFault):
    """Bytes on the engine socket that are not one of our frames."""

    default_reason = "ENGINE_FRAME_INVALID"


KINDS: dict[int, type[Any]] = dict(enumerate((*get_args(ToEngine), *get_args(FromEngine)), start=1))
_KIND_OF = {kind: number for number, kind in KINDS.items()}
M = TypeVar("M")


@dataclass(frozen=True)
class FrameHead:
    """The first 16 bytes of a frame, already checked."""

    kind: int
    json_bytes: int
    array_bytes: int

    SIZE: ClassVar[int] = HEAD.size

    @property
    def body_bytes(self) -> int:
        """Bytes that follow the head."""
        return self.json_bytes + self.array_bytes


def encode(message: Message) -> bytes:
    """Turn a message into one frame.

    Raises:
        FrameError: the message is larger than a frame may be, or a field has the wrong type.
    """
    scalars, arrays = _split(message)
    head = json.dumps(scalars, separators=(",", ":"), allow_nan=False).encode()
    blobs = [array.tobytes() for array in arrays]
    array_bytes = sum(map(len, blobs))
    _check_sizes(len(head), array_bytes)
    return b"".join(
        (HEAD.pack(MAGIC, _KIND_OF[type(message)], len(head), array_bytes), head, *blobs)
    )


def decode_head(data: bytes) -> FrameHead:
    """Read a frame's head, before its body is read or any memory is set aside for it.

    Raises:
        FrameError: short, wrong magic, unknown kind, or a size over the limit.
    """
    if len(data) != HEAD.size:
        raise FrameError("frame head is cut short", got=len(data), allowed=f"{HEAD.size} bytes")
    magic, kind, json_bytes, array_bytes = HEAD.unpack(data)
    if magic != MAGIC:
        raise FrameError("not an engine frame", got=magic.hex(), allowed=MAGIC.hex())
    if kind not in KINDS:
        raise FrameError("unknown kind of frame", got=kind, allowed=f"1 to {len(KINDS)}")
    _check_sizes(json_bytes, array_bytes)
    return FrameHead(kind, json_bytes, array_bytes)


def decode_body(head: FrameHead, body: bytes) -> Message:
    """Build the message of a frame whose head was read.

    Raises:
        FrameError: short, not JSON, missing or unknown fields, wrong types, arrays that do not fit.
    """
    if len(body) != head.body_bytes:
        raise FrameError("frame is cut short", got=len(body), allowed=f"{head.body_bytes} bytes")
    try:
        scalars = json.loads(body[: head.json_bytes])
    except ValueError as error:
        raise FrameError(f"frame holds no JSON: {error}") from None
    if not isinstance(scalars, dict):
        raise FrameError("frame's JSON must be an object", got=type(scalars).__name__)
    reader = _Arrays(memoryview(body)[head.json_bytes :])
    message: Message = _build(KINDS[head.kind], scalars, reader)
    reader.require_end()
    return message


def decode(frame: bytes) -> Message:
    """Read one whole frame: `decode_head` then `decode_body`."""
    return decode_body(decode_head(frame[: HEAD.size]), frame[HEAD.size :])


def _check_sizes(json_bytes: int, array_bytes: int) -> None:
    if json_bytes > MAX_JSON_BYTES:
        raise FrameError("frame's JSON is too large", got=json_bytes, allowed=MAX_JSON_BYTES)
    if array_bytes > MAX_ARRAY_BYTES:
        raise FrameError("frame's arrays are too large", got=array_bytes, allowed=MAX_ARRAY_BYTES)


_HINTS: dict[type[Any], dict[str, Any]] = {}


def _hints(kind: type[Any]) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


def _dtype(hint: Any) -> np.dtype[Any] | None:
    """Name the array type a field holds, or None for a scalar."""
    if hint == Int32s:
        return np.dtype("<i4")
    return np.dtype("<f4") if hint == Float32s else None


def _split(message: Any) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Separate a dataclass into JSON scalars (arrays as their lengths) and its arrays."""
    scalars: dict[str, Any] = {}
    arrays: list[NDArray[Any]] = []
    hints = _hints(type(message))
    for item in fields(message):
        value, dtype = getattr(message, item.name), _dtype(hints[item.name])
        if dtype is not None:
            if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != 1:
                raise FrameError(f"{item.name} must be a flat {dtype} array", got=type(value))
            scalars[item.name] = len(value)
            arrays.append(value)
        elif is_dataclass(value):
            scalars[item.name], nested = _split(value)
            arrays.extend(nested)
        else:
            scalars[item.name] = value
    return scalars, arrays


class _Arrays:
    """Cuts the arrays of a frame off its tail, in field order."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def take(self, name: str, count: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
        if type(count) is not int or count < 0 or count * dtype.itemsize > len(self._data):
            raise FrameError(
                f"array {name} does not fit its frame", got=count, allowed=len(self._data)
            )
        size = count * dtype.itemsize
        array = np.frombuffer(self._data[:size], dtype)
        self._data = self._data[size:]
        return array

    def require_end(self) -> None:
        if len(self._data):
            raise FrameError("frame has bytes after its arrays", got=len(self._data), allowed=0)


def _build(kind: type[M], scalars: Any, arrays: _Arrays) -> M:
    hints = _hints(kind)
    if not isinstance(scalars, dict) or set(scalars) != set(hints):
        got = sorted(scalars) if isinstance(scalars, dict) else type(scalars).__name__
        raise FrameError(f"{kind.__name__} has other fields", got=got, allowed=sorted(hints))
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        dtype, value = _dtype(hint), scalars[name]
        if dtype is not None:
            values[name] = arrays.take(name, value, dtype)
        elif is_dataclass(hint):
            values[name] = _build(hint, value, arrays)  # type: ignore[arg-type]
        else:
            values[name] = _scalar(f"{kind.__name__}.{name}", hint, value)
    return kind(**values)


def _scalar(name: str, hint: Any, value: Any) -> Any:
    """Check a JSON value against int, float, bool, str, Literal or a union with None."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    else:
        kinds = get_args(hint) or (hint,)
        if type(value) in kinds:
            return value
        if float in kinds and type(value) is int:
            return float(value)
    raise FrameError(f"{name} has the wrong type or value", got=repr(value), allowed=str(hint))
