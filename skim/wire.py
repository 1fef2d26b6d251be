"""Prompt parts, spans and byte ranges as they cross the wire, checked once for all services.

Between the generated messages and our value types: services call this at their edge and work on
`bytes` and `Span` below it. Refuses gaps, overlaps, oversized or empty parts, wrong totals and
digests, invalid UTF-8, ranges that are reversed or past the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from skim.errors import DigestMismatch, InvalidRequest, PartOutOfOrder, PromptTooLong
from skim.spans import Span, decode, encode, round_outward
from skim.v1 import common_pb2 as pb

MAX_PART_BYTES = 1 << 20
MAX_OFFSET = (1 << 32) - 1


class PromptAssembler:
    """Puts a prompt together from its parts and checks it.

    Args:
        max_bytes: largest prompt accepted; the server's own limit.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = min(max_bytes, MAX_OFFSET)
        self._data = bytearray()
        self._digest = hashlib.sha256()

    @property
    def size_bytes(self) -> int:
        """Bytes received so far."""
        return len(self._data)

    def add(self, part: pb.PromptPart) -> bytes:
        """Take the next part and return its bytes.

        Raises:
            PartOutOfOrder: it does not start where the last one ended.
            PromptTooLong: the prompt passes `max_bytes`.
            InvalidRequest: the part is empty or over 1 MiB.
        """
        size = len(part.data)
        if not 1 <= size <= MAX_PART_BYTES:
            raise InvalidRequest.field_value("prompt.data", size, f"1 to {MAX_PART_BYTES} bytes")
        if part.offset != len(self._data):
            raise PartOutOfOrder(
                f"prompt.offset must be {len(self._data)} (the bytes received so far), "
                f"got {part.offset}",
                field="prompt.offset",
                got=part.offset,
                allowed=len(self._data),
            )
        if len(self._data) + size > self._max_bytes:
            raise PromptTooLong(
                f"prompt must be at most {self._max_bytes} bytes, got more",
                field="prompt",
                metadata={"limit": str(self._max_bytes), "got": str(len(self._data) + size)},
            )
        self._data += part.data
        self._digest.update(part.data)
        return part.data

    def finish(self, end: pb.PromptEnd) -> bytes:
        """Check the whole prompt and return it.

        Raises:
            PartOutOfOrder: fewer or more bytes arrived than the sender counted.
            DigestMismatch: the digest differs.
            InvalidRequest: the prompt is empty, or not UTF-8.
        """
        prompt = bytes(self._data)
        if end.total_bytes != len(prompt):
            raise PartOutOfOrder(
                f"end.total_bytes must be the {len(prompt)} bytes that arrived, "
                f"got {end.total_bytes}",
                field="end.total_bytes",
                got=end.total_bytes,
                allowed=len(prompt),
            )
        if end.sha256 and end.sha256 != self._digest.digest():
            raise DigestMismatch(
                "end.sha256 differs from the digest of the bytes that arrived",
                field="end.sha256",
                got=end.sha256.hex(),
                allowed=self._digest.hexdigest(),
            )
        check_prompt_text(prompt)
        return prompt


def check_prompt_text(prompt: bytes) -> None:
    """Refuse an empty prompt and invalid UTF-8, naming the first bad byte."""
    if not prompt:
        raise InvalidRequest(
            "prompt must not be empty, got 0 bytes",
            field="prompt",
            reason="PROMPT_EMPTY",
            got="0 bytes",
            allowed="at least 1 byte",
        )
    try:
        prompt.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"prompt must be UTF-8, got invalid byte 0x{prompt[error.start]:02x} "
            f"at offset {error.start}",
            field="prompt",
            reason="INVALID_UTF8",
            got=f"0x{prompt[error.start]:02x} at byte {error.start}",
            allowed="UTF-8",
        ) from None


def split_parts(
    prompt: bytes, part_bytes: int = 256 * 1024, *, base: int = 0, message: int | None = None
) -> list[pb.PromptPart]:
    """Cut a prompt into parts of at most `part_bytes`, the first at offset `base`."""
    parts = []
    for begin in range(0, len(prompt), part_bytes):
        part = pb.PromptPart(offset=base + begin, data=prompt[begin : begin + part_bytes])
        if message is not None:
            part.message = message
        parts.append(part)
    return parts


def prompt_end(prompt: bytes) -> pb.PromptEnd:
    """Close an upload of `prompt`, with its digest."""
    return pb.PromptEnd(total_bytes=len(prompt), sha256=hashlib.sha256(prompt).digest())


def spans_to_proto(spans: Sequence[Span], prompt_bytes: int) -> pb.SpanSet:
    """Delta-code canonical spans."""
    gaps, lengths = encode(spans)
    return pb.SpanSet(prompt_bytes=prompt_bytes, gaps=gaps, lengths=lengths)


def spans_from_proto(message: pb.SpanSet, prompt: bytes, field: str = "spans") -> list[Span]:
    """Read spans and check that they belong to `prompt` and are canonical.

    Raises:
        InvalidRequest: `prompt_bytes` differs from the prompt's size.
        SpansNotCanonical: see `skim.spans.decode`.
    """
    if message.prompt_bytes != len(prompt):
        raise InvalidRequest.field_value(
            f"{field}.prompt_bytes", message.prompt_bytes, f"the prompt's {len(prompt)} bytes"
        )
    return decode(message.gaps, message.lengths, prompt)


def ranges_from_proto(
    ranges: Sequence[pb.ByteRange],
    field: str,
    *,
    max_count: int,
    disjoint: bool = False,
) -> list[Span]:
    """Read byte ranges before the prompt's size is known.

    Args:
        ranges: as received.
        field: name for the error.
        max_count: how many are allowed.
        disjoint: also require that they are sorted and do not overlap.
    Raises:
        InvalidRequest: too many, one is empty or reversed, or out of order.
    """
    if len(ranges) > max_count:
        raise InvalidRequest.field_value(field, len(ranges), f"at most {max_count} ranges")
    spans, previous_end = [], 0
    for index, item in enumerate(ranges):
        name = f"{field}[{index}]"
        if item.begin >= item.end:
            raise InvalidRequest.field_value(
                name, f"[{item.begin}, {item.end})", "a range with begin < end"
            )
        if disjoint and item.begin < previous_end:
            raise InvalidRequest.field_value(
                name, f"[{item.begin}, {item.end})", "sorted and apart from the range before it"
            )
        previous_end = item.end
        spans.append(Span(item.begin, item.end))
    return spans


def fit_ranges(ranges: Sequence[Span], field: str, prompt: bytes) -> list[Span]:
    """Check ranges against the prompt, and round them outward to whole code points.

    Raises:
        InvalidRequest: a range ends past the prompt.
    """
    for index, item in enumerate(ranges):
        if item.end > len(prompt):
            raise InvalidRequest.field_value(
                f"{field}[{index}]",
                f"[{item.begin}, {item.end})",
                f"inside the prompt's {len(prompt)} bytes",
            )
    return [round_outward(item, prompt) for item in ranges]
