"""One upload's checks, and when its rendered parts come out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest

from gateway.edge import ask_from_proto
from gateway.request import Ask
from gateway.upload import Upload
from skim.errors import DigestMismatch, InvalidRequest, PartOutOfOrder, PromptTooLong, SkimError
from skim.v1 import common_pb2 as pb
from skim.v1 import gateway_pb2
from skim.v1.gateway_pb2 import GenerateConfig, Message

USER = gateway_pb2.ROLE_USER
RAW = (b"", b"")


def ask(**fields: object) -> Ask:
    return ask_from_proto(GenerateConfig(**fields))  # type: ignore[arg-type]


def chat(*sizes: int | None) -> Ask:
    return ask(
        messages=[
            Message(role=USER) if size is None else Message(role=USER, size_bytes=size)
            for size in sizes
        ]
    )


def upload_of(asked: Ask, pieces: Sequence[bytes] = RAW, max_bytes: int = 1_000) -> Upload:
    return Upload(asked, pieces, max_bytes, hold=lambda size_bytes: None)


def part(offset: int, data: bytes, message: int | None = None) -> pb.PromptPart:
    made = pb.PromptPart(offset=offset, data=data)
    if message is not None:
        made.message = message
    return made


def test_a_raw_prompt_is_what_was_uploaded() -> None:
    upload = upload_of(ask())
    sent = upload.add(part(0, b"ab")) + upload.add(part(2, b"c"))
    sent += upload.finish(pb.PromptEnd(total_bytes=3, sha256=hashlib.sha256(b"abc").digest()))
    assert b"".join(sent) == b"abc" == upload.rendered() == b"".join(upload.rendered_parts())


def test_chat_with_stated_sizes_knows_its_layout_before_the_first_part() -> None:
    upload = upload_of(chat(2, 1), (b"<", b"|", b">"))
    assert upload.early_layout is not None
    assert upload.early_layout.prompt_bytes == 6


def test_chat_without_sizes_comes_out_whole_at_the_end() -> None:
    upload = upload_of(chat(2, None), (b"<", b"|", b">"))
    assert upload.early_layout is None
    assert upload.add(part(0, b"ab", 0)) == upload.add(part(2, b"c", 1)) == []
    assert upload.finish(pb.PromptEnd(total_bytes=3)) == [b"<ab|c>"]
    assert upload.layout.prompt_bytes == 6


def test_a_message_without_parts_is_empty() -> None:
    upload = upload_of(chat(0, 1, 0), (b"<", b"1", b"2", b">"))
    sent = upload.add(part(0, b"x", 1)) + upload.finish(pb.PromptEnd(total_bytes=1))
    assert b"".join(sent) == b"<1x2>"


def test_bytes_are_held_before_they_are_kept() -> None:
    held: list[int] = []
    upload = Upload(ask(), RAW, 100, hold=held.append)
    upload.add(part(0, b"abc"))
    upload.add(part(3, b"d"))
    assert held == [3, 4]


@pytest.mark.parametrize(
    ("asked", "parts", "end", "error", "field"),
    [
        (ask(), [part(1, b"a")], 1, PartOutOfOrder, "prompt.offset"),
        (ask(), [part(0, b"ab"), part(1, b"c")], 3, PartOutOfOrder, "prompt.offset"),
        (ask(), [part(0, b"ab"), part(3, b"c")], 3, PartOutOfOrder, "prompt.offset"),
        (ask(), [part(0, b"")], 0, InvalidRequest, "prompt.data"),
        (ask(), [part(0, b"x" * 1_001)], 1_001, PromptTooLong, "prompt"),
        (ask(), [], 0, InvalidRequest, "prompt"),
        (ask(), [part(0, b"ab")], 3, PartOutOfOrder, "end.total_bytes"),
        (ask(), [part(0, b"a\xff")], 2, InvalidRequest, "prompt"),
        (ask(), [part(0, "ü".encode()[:1])], 1, InvalidRequest, "prompt"),
        (ask(), [part(0, b"a", 0)], 1, InvalidRequest, "prompt.message"),
        (chat(1), [part(0, b"a")], 1, InvalidRequest, "prompt.message"),
        (chat(1), [part(0, b"a", 1)], 1, InvalidRequest, "prompt.message"),
        (chat(1, 1), [part(0, b"a", 1), part(1, b"b", 0)], 2, InvalidRequest, "prompt.message"),
        (chat(2), [part(0, b"a", 0)], 1, InvalidRequest, "config.messages[0].size_bytes"),
        (chat(1), [part(0, b"ab", 0)], 2, InvalidRequest, "config.messages[0].size_bytes"),
        (
            chat(1, 1),
            [part(0, "ü".encode()[:1], 0), part(1, "ü".encode()[1:], 1)],
            2,
            InvalidRequest,
            "prompt.message",
        ),
        (
            ask(protected=[pb.ByteRange(begin=0, end=1), pb.ByteRange(begin=0, end=3)]),
            [part(0, b"ab")],
            2,
            InvalidRequest,
            "config.protected[1]",
        ),
        (
            ask(query=pb.ByteRange(begin=1, end=3)),
            [part(0, b"ab")],
            2,
            InvalidRequest,
            "config.query",
        ),
        (
            ask(control_ranges=[pb.ByteRange(begin=1, end=3)]),
            [part(0, b"ab")],
            2,
            InvalidRequest,
            "config.control_ranges[0]",
        ),
    ],
)
def test_a_bad_upload_is_refused_by_name(
    asked: Ask, parts: list[pb.PromptPart], end: int, error: type[SkimError], field: str
) -> None:
    upload = upload_of(asked, (b"",) * (len(asked.roles or "x") + 1))
    with pytest.raises(error) as refused:
        for item in parts:
            upload.add(item)
        upload.finish(pb.PromptEnd(total_bytes=end))
    assert type(refused.value) is error
    assert refused.value.field == field


def test_a_wrong_digest_is_refused() -> None:
    upload = upload_of(ask())
    upload.add(part(0, b"ab"))
    with pytest.raises(DigestMismatch):
        upload.finish(pb.PromptEnd(total_bytes=2, sha256=b"\0" * 32))


def test_a_range_past_stated_sizes_is_refused_before_the_first_part() -> None:
    asked = ask(
        messages=[Message(role=USER, size_bytes=4)], protected=[pb.ByteRange(begin=2, end=5)]
    )
    with pytest.raises(InvalidRequest) as refused:
        upload_of(asked)
    assert refused.value.field == "config.protected[0]"
