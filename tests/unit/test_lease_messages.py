"""The messages of a lease: each crosses unchanged, and nothing else is let in."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.errors import ProtocolError
from kernels.ipc.messages import (
    MAX_SENTENCE,
    MAX_WHOLE,
    Copied,
    Fill,
    Filled,
    FromLandlord,
    FromTenant,
    Hello,
    Idle,
    Message,
    Parked,
    Quiesce,
    Ready,
    Refused,
    Region,
    State,
    Tensor,
    Unmapped,
    Want,
    decode,
    encode,
    fd_count,
)

TENSORS = (Tensor("embedding", "bf16", (8, 4), 0), Tensor("scale", "f32", (), 64))
# Each message, and how many descriptors travel with it.
MESSAGES: list[tuple[Message, int]] = [
    (Hello(1, "GPU-1", "drafter", "ab", "cd", 2 << 20), 0),
    (Filled(1, TENSORS, "ef"), 0),
    (Copied(3, 100, 2, done=True), 0),
    (Unmapped(3, 7), 0),
    (Want(), 0),
    (Idle(), 0),
    (Region(3, loaded=True, tensors=TENSORS), 2),
    (Region(3, loaded=False, tensors=TENSORS), 2),
    (Region(3, loaded=False, tensors=None), 1),
    (Parked(2, TENSORS), 1),
    (Fill(1), 2),
    (Ready(1), 0),
    (Quiesce(1, 5.0), 0),
    (State(decoding=True), 0),
    (Refused("NO_ROOM", "not now", 1.5), 0),
    (Refused("GPU_MISMATCH", "", None), 0),
]


def values_of(message: Message) -> dict[str, Any]:
    return json.loads(encode(message))


@pytest.mark.parametrize(("message", "fds"), MESSAGES)
def test_a_message_crosses_unchanged(message: Message, fds: int) -> None:
    assert decode(encode(message)) == message
    assert fd_count(message) == fds


def test_every_message_of_the_protocol_is_tried_here() -> None:
    kinds = {type(message) for message, _ in MESSAGES}
    assert kinds == {*get_args(FromTenant), *get_args(FromLandlord)}


def test_a_message_is_a_json_object_that_names_its_type() -> None:
    assert json.loads(encode(Filled(1, TENSORS, "ef"))) == {
        "type": "FILLED",
        "generation": 1,
        "tensors": [["embedding", "bf16", [8, 4], 0], ["scale", "f32", [], 64]],
        "checksum": "ef",
    }


@pytest.mark.parametrize("message", [message for message, _ in MESSAGES])
def test_a_missing_or_an_extra_field_is_refused(message: Message) -> None:
    value = values_of(message)
    with pytest.raises(ProtocolError, match="must have the fields"):
        decode(json.dumps({**value, "extra": 1}).encode())
    for field in fields(message):
        cut = {name: given_ for name, given_ in value.items() if name != field.name}
        with pytest.raises(ProtocolError, match=field.name):
            decode(json.dumps(cut).encode())


@pytest.mark.parametrize("message", [message for message, _ in MESSAGES])
def test_a_field_of_another_type_is_refused(message: Message) -> None:
    value = values_of(message)
    for field in fields(message):
        with pytest.raises(ProtocolError, match=field.name):
            decode(json.dumps({**value, field.name: {"an": "object"}}).encode())


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("pid", -1),
        ("pid", True),
        ("pid", 1.0),
        ("pid", "1"),
        ("pid", MAX_WHOLE),
        ("model", ""),
        ("model", "x" * 257),
        ("model", "a\nb"),
        ("model", "\ud800"),
        ("model", 1),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(field: str, wrong: object) -> None:
    value = {**values_of(MESSAGES[0][0]), field: wrong}
    with pytest.raises(ProtocolError, match=f"HELLO.{field} must be"):
        decode(json.dumps(value).encode())


@pytest.mark.parametrize(
    "rows",
    [
        [["a", "bf16", [1]]],
        [["a", "bf16", [1], 0, 0]],
        [["a", "bf16", "1", 0]],
        [["a", "bf16", [-1], 0]],
        [["a", "bf16", [True], 0]],
        [["", "bf16", [1], 0]],
        ["abcd"],
        [7],
        {},
    ],
)
def test_a_tensor_table_of_another_shape_is_refused(rows: object) -> None:
    value = {**values_of(Parked(2, TENSORS)), "tensors": rows}
    with pytest.raises(ProtocolError, match="PARKED.tensors must be"):
        decode(json.dumps(value).encode())


def test_a_region_is_never_loaded_for_a_tenant_that_only_has_the_image() -> None:
    value = {**values_of(Region(3, False, None)), "loaded": True}
    with pytest.raises(ProtocolError, match="loaded"):
        decode(json.dumps(value).encode())


def test_an_unknown_reason_and_words_without_end_are_refused() -> None:
    value = values_of(Refused("NO_ROOM", "", None))
    for wrong in ({"reason": "BORED"}, {"message": "x" * (MAX_SENTENCE + 1)}):
        with pytest.raises(ProtocolError):
            decode(json.dumps({**value, **wrong}).encode())


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-1", "1e999"])
def test_seconds_that_are_none_are_refused(seconds: str) -> None:
    with pytest.raises(ProtocolError):
        decode(b'{"type":"QUIESCE","generation":1,"deadline_s":%s}' % seconds.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"WANT"',
        b'{"type":"WANT"',
        b"{}",
        b'{"type":null}',
        b'{"type":"want"}',
        b'{"type":"WANT","type":"WANT"}',
        b"\xff",
        b"[" * 100_000,
        b'{"type":' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(body)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_a_message_or_refused(body: bytes) -> None:
    try:
        message = decode(body)
    except ProtocolError:
        return
    assert decode(encode(message)) == message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(st.sampled_from([message for message, _ in MESSAGES]), st.data())
def test_a_message_with_one_field_forged_is_a_message_or_refused(
    message: Message, data: st.DataObject
) -> None:
    value = values_of(message)
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(JSON)
    try:
        read = decode(json.dumps(value).encode())
    except ProtocolError:
        return
    assert decode(encode(read)) == read
