"""What the target refuses on the wire: each with code, reason and field, and it goes on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from skim.errors import (
    DeadlineExceeded,
    DigestMismatch,
    InvalidRequest,
    NotFound,
    PartOutOfOrder,
    PreconditionFailed,
    PromptTooLong,
    SkimError,
    SpansNotCanonical,
)
from skim.rpc_errors import from_rpc_error
from skim.v1 import common_pb2 as pb
from skim.v1 import target_pb2
from tests.fixtures.target import (
    Request,
    RunningTarget,
    ask,
    config,
    full,
    messages,
    running_target,
    send,
    skim,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "naïve words in a row".encode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target() -> AsyncIterator[RunningTarget]:
    async with running_target(prompt_max_bytes=4096) as running:
        yield running


async def refusal(target: RunningTarget, requests: list[Request]) -> SkimError:
    with pytest.raises(SkimError) as refused:
        await send(target, requests)
    return refused.value


def part(offset: int, data: bytes, **fields: Any) -> Request:
    return Request(prompt=pb.PromptPart(offset=offset, data=data, **fields))


def end(total: int, sha256: bytes = b"") -> Request:
    return Request(end=pb.PromptEnd(total_bytes=total, sha256=sha256))


CONFIG = Request(config=config())
PLAN = Request(plan=full())

STREAMS: dict[str, tuple[list[Request], type[SkimError], str, str | None]] = {
    "an empty prompt": ([CONFIG, end(0), PLAN], InvalidRequest, "PROMPT_EMPTY", "prompt"),
    "invalid UTF-8": (
        [CONFIG, part(0, b"ab\xff"), end(3), PLAN],
        InvalidRequest,
        "INVALID_UTF8",
        "prompt",
    ),
    "a code point cut by the end": (
        [CONFIG, part(0, b"ab\xc3"), end(3), PLAN],
        InvalidRequest,
        "INVALID_UTF8",
        "prompt",
    ),
    "a gap between parts": (
        [CONFIG, part(0, b"ab"), part(3, b"c"), end(4), PLAN],
        PartOutOfOrder,
        "PART_OUT_OF_ORDER",
        "prompt.offset",
    ),
    "an overlap of parts": (
        [CONFIG, part(0, b"ab"), part(1, b"bc"), end(3), PLAN],
        PartOutOfOrder,
        "PART_OUT_OF_ORDER",
        "prompt.offset",
    ),
    "an empty part": ([CONFIG, part(0, b"")], InvalidRequest, "INVALID_ARGUMENT", "prompt.data"),
    "a part that names a message": (
        [CONFIG, part(0, b"ab", message=0)],
        InvalidRequest,
        "INVALID_ARGUMENT",
        "prompt.message",
    ),
    "a wrong total": (
        [CONFIG, part(0, b"ab"), end(3), PLAN],
        PartOutOfOrder,
        "PART_OUT_OF_ORDER",
        "end.total_bytes",
    ),
    "a wrong digest": (
        [CONFIG, part(0, b"ab"), end(2, hashlib.sha256(b"ac").digest()), PLAN],
        DigestMismatch,
        "DIGEST_MISMATCH",
        "end.sha256",
    ),
    "a prompt over the limit": (
        [CONFIG, part(0, b"x" * 4097)],
        PromptTooLong,
        "PROMPT_TOO_LONG",
        "prompt",
    ),
    "a prompt without a config": ([part(0, b"ab")], InvalidRequest, "INVALID_ARGUMENT", "part"),
    "a second config": ([CONFIG, CONFIG], InvalidRequest, "INVALID_ARGUMENT", "part"),
    "a plan before the end": (
        [CONFIG, part(0, b"ab"), PLAN],
        InvalidRequest,
        "INVALID_ARGUMENT",
        "part",
    ),
    "a part after the end": (
        [CONFIG, part(0, b"ab"), end(2), part(2, b"c")],
        InvalidRequest,
        "INVALID_ARGUMENT",
        "part",
    ),
    "no plan": ([CONFIG, part(0, b"ab"), end(2)], InvalidRequest, "INVALID_ARGUMENT", "part"),
    "a message without a part": ([Request()], InvalidRequest, "INVALID_ARGUMENT", "part"),
    "no message at all": ([], InvalidRequest, "INVALID_ARGUMENT", "part"),
    "two plans": (
        [*messages(PROMPT, full(), config(max_tokens=64, ignore_eos=True)), PLAN],
        InvalidRequest,
        "INVALID_ARGUMENT",
        "part",
    ),
    "an unknown model": (
        [Request(config=config(model="other"))],
        NotFound,
        "MODEL_NOT_FOUND",
        "config.model",
    ),
    "a temperature that is no number": (
        [Request(config=config(temperature=math.nan))],
        InvalidRequest,
        "INVALID_ARGUMENT",
        "config.sampling.temperature",
    ),
    "more tokens than gen_max": (
        [Request(config=config(max_tokens=65))],
        InvalidRequest,
        "INVALID_ARGUMENT",
        "config.sampling.max_tokens",
    ),
    "a control range past the end": (
        messages(PROMPT, full(), config(control_ranges=[pb.ByteRange(begin=3, end=99)])),
        InvalidRequest,
        "INVALID_ARGUMENT",
        "config.control_ranges[0]",
    ),
    "original positions on a plain rope": (
        [Request(config=config(positions=pb.POSITION_MODE_ORIGINAL))],
        PreconditionFailed,
        "POSITIONS_NOT_SUPPORTED",
        "config.positions",
    ),
    "spans that cut a code point": (
        messages(PROMPT, skim(PROMPT, (0, 3))),
        SpansNotCanonical,
        "SPANS_NOT_CANONICAL",
        "spans[0]",
    ),
    "spans that touch": (
        messages(PROMPT, skim(PROMPT, (0, 2), (2, 4))),
        SpansNotCanonical,
        "SPANS_NOT_CANONICAL",
        "spans[1]",
    ),
    "spans of another prompt": (
        messages(PROMPT, skim(b"short", (0, 2))),
        InvalidRequest,
        "INVALID_ARGUMENT",
        "plan.skim.spans.prompt_bytes",
    ),
    "a skim plan without spans": (
        messages(PROMPT, skim(PROMPT)),
        InvalidRequest,
        "INVALID_ARGUMENT",
        "plan.skim.spans",
    ),
    "a plan of no kind": (
        messages(PROMPT, target_pb2.Plan()),
        InvalidRequest,
        "INVALID_ARGUMENT",
        "plan.kind",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
async def test_a_bad_stream_is_refused_with_code_reason_and_field(
    target: RunningTarget, name: str
) -> None:
    requests, kind, reason, field = STREAMS[name]
    error = await refusal(target, requests)
    assert type(error) is kind and (error.reason, error.field) == (reason, field)
    assert error.metadata, "an error says what came and what is allowed"


async def test_after_all_these_the_service_still_answers(target: RunningTarget) -> None:
    for requests, *_ in STREAMS.values():
        await refusal(target, requests)
    assert (await ask(target, PROMPT)).finish is not None
    assert await target.idle()


async def test_a_caller_that_falls_silent_is_let_go(target: RunningTarget) -> None:
    async with running_target(idle_timeout_s=0.05) as impatient:
        call = impatient.stub.Generate()
        await call.write(CONFIG)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        error = from_rpc_error(failed.value)
    assert isinstance(error, DeadlineExceeded) and "prompt or end" in error.message


@pytest.mark.parametrize(
    ("roles", "kind"),
    [
        ([], InvalidRequest),
        (["user"] * 4097, InvalidRequest),
        (["user"], PreconditionFailed),  # this model has no template
    ],
)
async def test_chat_that_cannot_be_rendered_is_refused(
    target: RunningTarget, roles: list[str], kind: type[SkimError]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await target.stub.RenderChat(target_pb2.RenderChatRequest(roles=roles))
    error = from_rpc_error(failed.value)
    assert type(error) is kind
    assert kind is InvalidRequest or error.reason == "NO_CHAT_TEMPLATE"
