"""Prompt parts and byte ranges are checked at the edge."""

from __future__ import annotations

import pytest

from skim import errors
from skim.spans import Span
from skim.v1 import common_pb2 as pb
from skim.wire import (
    MAX_PART_BYTES,
    PromptAssembler,
    fit_ranges,
    prompt_end,
    ranges_from_proto,
    spans_from_proto,
    spans_to_proto,
    split_parts,
)

PROMPT = "naïve 🙂 prompt".encode()


def assemble(parts: list[pb.PromptPart], end: pb.PromptEnd, max_bytes: int = 1000) -> bytes:
    assembler = PromptAssembler(max_bytes)
    for part in parts:
        assembler.add(part)
    return assembler.finish(end)


@pytest.mark.parametrize("part_bytes", [1, 2, 3, 7, 1000])
def test_parts_of_any_size_give_the_prompt_back(part_bytes: int) -> None:
    assert assemble(split_parts(PROMPT, part_bytes), prompt_end(PROMPT)) == PROMPT


@pytest.mark.parametrize(
    ("parts", "end", "error", "field"),
    [
        ([pb.PromptPart(offset=1, data=b"a")], None, errors.PartOutOfOrder, "prompt.offset"),
        (
            [pb.PromptPart(offset=0, data=b"ab"), pb.PromptPart(offset=1, data=b"c")],
            None,
            errors.PartOutOfOrder,
            "prompt.offset",
        ),
        ([pb.PromptPart(offset=0, data=b"")], None, errors.InvalidRequest, "prompt.data"),
        (
            [pb.PromptPart(offset=0, data=b"x" * (MAX_PART_BYTES + 1))],
            None,
            errors.InvalidRequest,
            "prompt.data",
        ),
        (split_parts(b"x" * 1001), None, errors.PromptTooLong, "prompt"),
        ([], pb.PromptEnd(total_bytes=0), errors.InvalidRequest, "prompt"),
        (
            split_parts(b"abc"),
            pb.PromptEnd(total_bytes=4),
            errors.PartOutOfOrder,
            "end.total_bytes",
        ),
        (
            split_parts(b"abc"),
            pb.PromptEnd(total_bytes=3, sha256=b"0" * 32),
            errors.DigestMismatch,
            "end.sha256",
        ),
        (split_parts(b"ab\xff"), pb.PromptEnd(total_bytes=3), errors.InvalidRequest, "prompt"),
    ],
)
def test_bad_upload_is_refused_by_name(
    parts: list[pb.PromptPart], end: pb.PromptEnd | None, error: type, field: str
) -> None:
    with pytest.raises(error) as caught:
        assemble(parts, end or pb.PromptEnd())
    assert caught.value.field == field
    assert str(caught.value)


def test_spans_survive_the_wire() -> None:
    spans = [Span(0, 2), Span(4, 7), Span(11, len(PROMPT))]
    assert spans_from_proto(spans_to_proto(spans, len(PROMPT)), PROMPT) == spans


def test_spans_of_another_prompt_are_refused() -> None:
    with pytest.raises(errors.InvalidRequest, match="prompt_bytes"):
        spans_from_proto(spans_to_proto([Span(0, 2)], 5), PROMPT)


def test_ranges_are_widened_to_code_points_and_checked() -> None:
    ranges = ranges_from_proto([pb.ByteRange(begin=3, end=5)], "protected", max_count=2)
    assert fit_ranges(ranges, "protected", PROMPT) == [Span(2, 5)]
    with pytest.raises(errors.InvalidRequest, match=r"protected\[0\]"):
        fit_ranges([Span(0, 999)], "protected", PROMPT)
    with pytest.raises(errors.InvalidRequest, match=r"protected\[0\]"):
        ranges_from_proto([pb.ByteRange(begin=5, end=5)], "protected", max_count=2)
    with pytest.raises(errors.InvalidRequest, match="at most 1"):
        ranges_from_proto([pb.ByteRange(begin=0, end=1)] * 2, "protected", max_count=1)
    with pytest.raises(errors.InvalidRequest, match=r"control_ranges\[1\]"):
        ranges_from_proto(
            [pb.ByteRange(begin=4, end=6), pb.ByteRange(begin=5, end=9)],
            "control_ranges",
            max_count=9,
            disjoint=True,
        )
