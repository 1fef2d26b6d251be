"""The messages of a lease: what the landlord of a drafter's weights and its tenant say.

One frozen dataclass a message; `encode` and `decode` are the only doors between them and the JSON
object of a frame (`channel.py` frames them and carries the file descriptors). `decode` trusts
nobody: a frame that is not one JSON object, of an unknown type, with missing, extra, repeated or
ill-typed fields is refused with ProtocolError.

    tenant → landlord   HELLO  FILLED  COPIED  UNMAPPED  WANT  IDLE
    landlord → tenant   REGION  PARKED  FILL  READY  QUIESCE  STATE  REFUSED
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn, get_args

from kernels.errors import ProtocolError

PROTOCOL = 1
MAX_FRAME_BYTES = 1 << 20
MAX_TEXT = 256  # characters of a name, a digest, a uuid
MAX_SENTENCE = 4_096  # characters of a refusal's words
MAX_WHOLE = 1 << 63  # exclusive: what protobuf and C can hold

Reason = Literal[
    "GPU_MISMATCH",  # the tenant runs on another GPU
    "REGION_BUSY",  # another tenant holds the region
    "NO_ROOM",  # not enough memory now: wait, and ask again
    "CHECKSUM_MISMATCH",  # the image is not what FILLED says
    "BAD_MESSAGE",  # out of turn, out of range, or not of this protocol
    "PEER_NOT_ALLOWED",  # the user id that the kernel names may not connect
]

Sentence = str  # longer than a name


@dataclass(frozen=True)
class Tensor:
    """One row of a region's tensor table; `offset` in bytes from the region's begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Hello:
    """A tenant asks for the region of a model; said again on the same socket, it swaps.

    The tenant has unmapped its former region before it says this again. What it receives before
    the answer (Region, Parked, Fill or Refused) still speaks of the former one.
    """

    pid: int
    gpu_uuid: str
    model: str  # name, for people
    model_digest: str
    layout_digest: str
    size_bytes: int  # of region and image, a multiple of the device's granularity
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Filled:
    """Region and image hold the weights; `checksum` is `image.checksum` of the image."""

    generation: int
    tensors: Tensors
    checksum: str


@dataclass(frozen=True)
class Copied:
    """How far the copy into the region is; `done`: it holds everything."""

    generation: int
    copied_bytes: int
    layers_ready: int
    done: bool


@dataclass(frozen=True)
class Unmapped:
    """Answers Quiesce: nothing of the region is mapped or imported any more."""

    generation: int
    workspace_bytes: int  # what the tenant's own arena gave back to the device besides


@dataclass(frozen=True)
class Want:
    """A request waits while the region is parked."""


@dataclass(frozen=True)
class Idle:
    """No request is queued or running."""


@dataclass(frozen=True)
class Region:
    """The region, to be mapped.

    With a tensor table its descriptors are [region, image], and the tenant attaches to both.
    Without one the only descriptor is the region, for the tenant holds the image already.
    `loaded` false: the tenant copies the image into the region.
    """

    generation: int
    loaded: bool
    tensors: Tensors | None


@dataclass(frozen=True)
class Parked:
    """Answers Hello where the region has no device memory now; descriptors [image]."""

    generation: int
    tensors: Tensors


@dataclass(frozen=True)
class Fill:
    """Answers Hello for an unknown model; descriptors [region, image], both to be written."""

    generation: int


@dataclass(frozen=True)
class Ready:
    """The image was checked against Filled: the region is good."""

    generation: int


@dataclass(frozen=True)
class Quiesce:
    """Finish the running pass, unmap, answer Unmapped; at the deadline the lease is revoked."""

    generation: int
    deadline_s: float  # from now


@dataclass(frozen=True)
class State:
    """Whether the target decodes now, for the tenant's pacing."""

    decoding: bool


@dataclass(frozen=True)
class Refused:
    """What was asked cannot be done; `retry_after_s` is None where asking again is no use."""

    reason: Reason
    message: Sentence
    retry_after_s: float | None


FromTenant = Hello | Filled | Copied | Unmapped | Want | Idle
FromLandlord = Region | Parked | Fill | Ready | Quiesce | State | Refused
Message = FromTenant | FromLandlord

_BY_TYPE: dict[str, type[Any]] = {
    kind.__name__.upper(): kind for kind in (*get_args(FromTenant), *get_args(FromLandlord))
}


def fd_count(message: Message) -> int:
    """How many file descriptors travel with a message."""
    match message:
        case Region(tensors=None) | Parked():
            return 1
        case Region() | Fill():
            return 2
        case _:
            return 0


def encode(message: Message) -> bytes:
    """Turn a message into its JSON object, in UTF-8."""
    body: dict[str, Any] = {"type": type(message).__name__.upper()}
    for field in fields(message):
        body[field.name] = getattr(message, field.name)
    if body.get("tensors") is not None:
        body["tensors"] = [[row.name, row.dtype, row.shape, row.offset] for row in body["tensors"]]
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


def decode(body: bytes) -> Message:
    """Read one message.

    Raises:
        ProtocolError: it is not exactly one of the messages above.
    """
    try:
        value = json.loads(body, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _error(f"a frame is not a JSON object: {_short(error)}") from None
    if not isinstance(value, dict):
        raise _error(f"a frame must be a JSON object, got {type(value).__name__}")
    name = value.pop("type", None)
    kind = _BY_TYPE.get(name) if isinstance(name, str) else None
    if kind is None:
        raise _error(f"type must be one of {', '.join(_BY_TYPE)}, got {_short(name)}")
    known = {field.name: str(field.type) for field in fields(kind)}
    if value.keys() != known.keys():
        wrong = sorted(value.keys() ^ known.keys())
        raise _error(f"{name} must have the fields {', '.join(known)}; wrong: {_short(wrong)}")
    given = {field: _read(f"{name}.{field}", value[field], known[field]) for field in known}
    message: Message = kind(**given)
    if isinstance(message, Region) and message.tensors is None and message.loaded:
        raise _error("REGION.loaded must be false where no tensors are given, got true")
    return message


def _read(field: str, value: object, annotation: str) -> Any:
    read, allowed = _READERS[annotation]
    try:
        return read(value)
    except (TypeError, ValueError):
        raise _error(f"{field} must be {allowed}, got {_short(value)}") from None


def _whole(value: object) -> int:
    if type(value) is int and 0 <= value < MAX_WHOLE:  # a bool is an int, but not for us
        return value
    raise ValueError


def _seconds(value: object) -> float:
    if type(value) in (int, float) and 0 <= value < math.inf:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise ValueError


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError


def _sentence(value: object) -> str:
    if isinstance(value, str) and len(value) <= MAX_SENTENCE:
        return value
    raise ValueError


def _reason(value: object) -> Any:
    if isinstance(value, str) and value in get_args(Reason):
        return value
    raise ValueError


def _tensors(value: object) -> Tensors:
    if not isinstance(value, list):
        raise ValueError
    rows = []
    for row in value:
        name, dtype, shape, offset = row
        if not isinstance(shape, list):
            raise ValueError
        sizes = tuple(_whole(size) for size in shape)
        rows.append(Tensor(_name(name), _name(dtype), sizes, _whole(offset)))
    return tuple(rows)


def _name(value: object) -> str:
    if isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable():
        return value
    raise ValueError


def _or_none(read: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else read(value)


_TENSORS_ALLOWED = "a list of [name, dtype, [shape], offset]"
_NAMES = f"1 to {MAX_TEXT} printable characters"
# By the annotation of a dataclass field: how it is read, and what is allowed.
_READERS: dict[str, tuple[Callable[[object], Any], str]] = {
    "int": (_whole, "a whole number, 0 to 2^63 - 1"),
    "float": (_seconds, "a number of seconds, 0 or more"),
    "float | None": (_or_none(_seconds), "a number of seconds, 0 or more, or null"),
    "bool": (_flag, "true or false"),
    "str": (_name, _NAMES),
    "Sentence": (_sentence, f"at most {MAX_SENTENCE} characters"),
    "Reason": (_reason, f"one of {', '.join(get_args(Reason))}"),
    "Tensors": (_tensors, _TENSORS_ALLOWED),
    "Tensors | None": (_or_none(_tensors), f"{_TENSORS_ALLOWED}, or null"),
}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, Exception) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _error(message: str) -> ProtocolError:
    return ProtocolError("lease", message)
