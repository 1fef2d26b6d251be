"""Frames between the service and its engine child: what survives the trip, what is refused."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from target_svc.frames import (
    HEAD,
    KINDS,
    MAGIC,
    MAX_ARRAY_BYTES,
    FrameError,
    FrameHead,
    decode,
    decode_body,
    decode_head,
    encode,
)
from target_svc.messages import (
    Cancel,
    Done,
    EngineConfig,
    Failed,
    Load,
    Message,
    Open,
    Progress,
    Ready,
    Release,
    Released,
    Reserve,
    Reserved,
    ReserveFailed,
    StartFailed,
    Submit,
    Tokens,
)
from target_svc.sampling import Sampling


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


READY = Ready(
    *("qwen3", "words", 4096, 32768, 6, 256, 6_000_000, 5_800_000, "neox", False, True, False),
    *(False, 1, 18432, 18432, 6216, 2048, 2, 0.5, 0.25, ints(0, 2)),
)
MESSAGES: list[Message] = [
    Open(EngineConfig("model.gguf", kv_type="q8_0")),
    Submit(
        "r-1",
        ints(5, 6, 2_000_000_000),
        7,
        sampling=Sampling(temperature=0.7, top_k=40, top_p=0.9, seed=2**63, top_logprobs=3),
        positions=ints(0, 9, 11),
        original_ids=ints(*range(12)),
        next_position=12,
        stop_ids=ints(2),
        deadline_monotonic_s=1234.5,
        full=True,
        speculate=False,
    ),
    Cancel("r-1"),
    Reserve(4096, "q4_0"),
    Release(),
    READY,
    StartFailed("ModelFileError", "MODEL_FILE_INVALID", "cut short"),
    Progress("r-1", 2048, 16384),
    Tokens(
        "r-1",
        ints(3, 4),
        np.array([-0.5, -1.5], np.float32),
        ints(3, 9, 4, 8),
        np.array([-0.5, -2, -1.5, -3], np.float32),
    ),
    Done("r-1", "stop", 1600, 9, 2, 14, 6, 3, 0.0, 0.25, 0.5, 99.5),
    Failed("r-1", "DeadlineExceeded", "DEADLINE_EXCEEDED", "the deadline passed"),
    Reserved(131072, 0.26, 0.1),
    ReserveFailed("Busy", "CONTEXT_MEMORY", "no memory"),
    Released(),
    Load(1, 2, 1, 3, 4, 0, 1000.0, 65.5),
]
SUBMIT = encode(Submit("r-1", ints(1, 2, 3), 4))


def equal(first: object, second: object) -> bool:
    """Compare messages field by field, arrays by value and type."""
    for item in fields(first):  # type: ignore[arg-type]
        a, b = getattr(first, item.name), getattr(second, item.name)
        if isinstance(a, np.ndarray):
            if a.dtype != b.dtype or not np.array_equal(a, b):
                return False
        elif a != b:
            return False
    return type(first) is type(second)


def forged(scalars: object, arrays: bytes = b"", kind: int = 2) -> bytes:
    text = scalars if isinstance(scalars, bytes) else json.dumps(scalars).encode()
    return HEAD.pack(MAGIC, kind, len(text), len(arrays)) + text + arrays


def submit_scalars() -> dict[str, object]:
    head = decode_head(SUBMIT[: HEAD.size])
    scalars: dict[str, object] = json.loads(SUBMIT[HEAD.size :][: head.json_bytes])
    return scalars


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_message_is_the_same_after_the_trip(message: Message) -> None:
    assert equal(decode(encode(message)), message)


def test_every_kind_of_message_is_among_the_examples() -> None:
    assert {type(message) for message in MESSAGES} == set(KINDS.values())


def test_decoded_arrays_cannot_be_written() -> None:
    submit = decode(SUBMIT)
    assert isinstance(submit, Submit) and not submit.ids.flags.writeable


def test_frame_cut_short_anywhere_is_refused() -> None:
    for cut in range(len(SUBMIT)):
        with pytest.raises(FrameError):
            decode(SUBMIT[:cut])


@given(st.integers(0, len(SUBMIT) - 1), st.integers(1, 255))
def test_flipped_byte_is_refused_or_still_a_message(index: int, mask: int) -> None:
    changed = bytearray(SUBMIT)
    changed[index] ^= mask
    try:
        message = decode(bytes(changed))
    except FrameError:
        return
    assert type(message) in KINDS.values()


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_frame_error(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode(data)


def test_head_names_a_wrong_magic() -> None:
    with pytest.raises(FrameError, match="not an engine frame"):
        decode_head(b"HTTP" + SUBMIT[4 : HEAD.size])


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(FrameError, match="unknown kind"):
        decode(forged({}, kind=len(KINDS) + 1))


def test_oversized_frame_is_refused_from_its_head_alone() -> None:
    with pytest.raises(FrameError, match="too large") as caught:
        decode_head(HEAD.pack(MAGIC, 2, 10, MAX_ARRAY_BYTES + 1))
    assert caught.value.metadata["allowed"] == str(MAX_ARRAY_BYTES)


def test_oversized_message_is_refused_before_it_is_sent() -> None:
    with pytest.raises(FrameError, match="too large"):
        encode(Cancel("x" * (2 << 20)))


def test_array_of_another_type_is_refused_before_it_is_sent() -> None:
    with pytest.raises(FrameError, match="ids must be a flat int32 array"):
        encode(Submit("r-1", np.zeros(3, np.int64), 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": "4"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"full": 1}, "full"),
        ({"request_id": None}, "request_id"),
        ({"ids": -1}, "does not fit"),
        ({"ids": 4}, "does not fit"),
        ({"ids": 2}, "after its arrays"),
        ({"ids": "3"}, "does not fit"),
        ({"sampling": 7}, "Sampling"),
        ({"sampling": {"temperature": 1.0}}, "Sampling"),
        ({"surprise": 1}, "other fields"),
    ],
)
def test_forged_field_is_refused_by_name(change: dict[str, object], message: str) -> None:
    arrays = np.array([1, 2, 3], np.int32).tobytes()
    assert isinstance(decode(forged(submit_scalars(), arrays)), Submit)  # the forgery's twin passes
    with pytest.raises(FrameError, match=message):
        decode(forged({**submit_scalars(), **change}, arrays))


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{", b'{"a"\xff'])
def test_body_without_a_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(FrameError):
        decode(forged(text))


def test_literal_outside_its_set_is_refused() -> None:
    with pytest.raises(FrameError, match="kv_type"):
        decode(forged({"cells": 1, "kv_type": "q5_1"}, kind=4))


def test_body_of_another_length_than_its_head_says_is_refused() -> None:
    with pytest.raises(FrameError, match="cut short"):
        decode_body(FrameHead(3, 10, 0), b"{}")
