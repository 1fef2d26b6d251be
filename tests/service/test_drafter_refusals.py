"""What the drafter's Score refuses, field by field, over a real socket."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from skim.errors import (
    DeadlineExceeded,
    DigestMismatch,
    InvalidRequest,
    NotFound,
    PartOutOfOrder,
    PromptTooLong,
    SkimError,
    Unavailable,
)
from skim.rpc_errors import errors_from_peer
from skim.spans import Span, check_canonical
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2
from tests.fixtures.drafter_service import (
    DrafterService,
    iter_async,
    long_text,
    messages,
    running_drafter,
    spans_of,
)
from tests.fixtures.engine import tiny_model

PROMPT = long_text()
NAN = float("nan")
Request = drafter_pb2.ScoreRequest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def drafter() -> AsyncIterator[DrafterService]:
    async with running_drafter(
        prompt_max_bytes=100_000, prompt_max_tokens=4_000, workspace_bytes=1 << 20
    ) as service:
        yield service


pytestmark = pytest.mark.asyncio(loop_scope="module")


S, C, R = pb.SelectionConfig, pb.ScoringConfig, pb.ByteRange

BAD_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("config.selection.keep_ratio", {"selection": S(keep_ratio=0.0)}),
    ("config.selection.keep_ratio", {"selection": S(keep_ratio=1.5)}),
    ("config.selection.keep_ratio", {"selection": S(keep_ratio=-0.1)}),
    ("config.selection.keep_ratio", {"selection": S(keep_ratio=NAN)}),
    ("config.selection.coverage", {"selection": S(coverage=NAN)}),
    ("config.selection.coverage", {"selection": S(coverage=1.01)}),
    ("config.selection.coverage", {"selection": S(keep_ratio=0.1, coverage=0.9)}),
    ("config.selection.min_keep", {"selection": S(min_keep=0.0)}),
    ("config.selection.max_keep", {"selection": S(max_keep=float("inf"))}),
    ("config.selection.max_keep", {"selection": S(min_keep=0.5, max_keep=0.4)}),
    ("config.selection.head_chunks", {"selection": S(head_chunks=1_025)}),
    ("config.selection.tail_chunks", {"selection": S(tail_chunks=1_025)}),
    ("config.selection.neighbour_chunks", {"selection": S(neighbour_chunks=65)}),
    ("config.scoring.scorer", {"scoring": C(scorer="best")}),
    ("config.scoring.scorer", {"scoring": C(scorer="")}),
    ("config.scoring.alpha", {"scoring": C(alpha=NAN)}),
    ("config.scoring.alpha", {"scoring": C(alpha=1.1)}),
    ("config.scoring.max_density", {"scoring": C(max_density=0.0)}),
    ("config.scoring.max_density", {"scoring": C(max_density=NAN)}),
    ("config.scoring.lookahead_tokens", {"scoring": C(lookahead_tokens=33)}),
    (
        "config.scoring.lookahead_tokens",
        {"scoring": C(scorer="lexical", lookahead_tokens=1)},
    ),
    (
        "config.selection.coverage",
        {"scoring": C(scorer="lexical"), "selection": S(coverage=0.9)},
    ),
    ("config.protect_tail_tokens", {"protect_tail_tokens": 65_537}),
    ("config.protected[1]", {"protected": [R(begin=0, end=1), R(begin=5, end=5)]}),
    ("config.protected[0]", {"protected": [R(begin=0, end=len(PROMPT) + 1)]}),
    ("config.protected", {"protected": [R(begin=0, end=1)] * 4_097}),
    ("config.query", {"query": R(begin=9, end=3)}),
    ("config.query", {"query": R(begin=0, end=len(PROMPT) + 1)}),
    ("config.control_ranges[1]", {"control_ranges": [R(begin=5, end=9), R(begin=8, end=12)]}),
    ("config.control_ranges[0]", {"control_ranges": [R(begin=5, end=len(PROMPT) + 1)]}),
    ("config.request_id", {"request_id": "x" * 129}),
]


@pytest.mark.parametrize(("name", "config"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
async def test_bad_config_is_refused_by_field_with_got_and_allowed(drafter, name, config):
    with pytest.raises(InvalidRequest) as caught:
        await drafter.score(PROMPT, **config)
    error = caught.value
    assert error.field == name
    assert error.metadata["got"] and error.metadata["allowed"]
    assert name in error.message


async def test_unknown_model_is_not_found(drafter):
    with pytest.raises(NotFound) as caught:
        await drafter.score(PROMPT, model="another")
    assert caught.value.metadata == {"got": "another", "allowed": "one"}


def sent(*parts: Any, end: Any = None) -> list[Any]:
    config = [Request(config=drafter_pb2.ScoreConfig())]
    return [
        *config,
        *(Request(prompt=part) for part in parts),
        *([Request(end=end)] if end else []),
    ]


PART = pb.PromptPart

BAD_STREAMS: list[tuple[str, type[SkimError], str, list[Any]]] = [
    ("nothing", InvalidRequest, "part", []),
    ("no config", InvalidRequest, "part", messages(PROMPT)[1:]),
    ("empty message", InvalidRequest, "part", [Request()]),
    ("two configs", InvalidRequest, "part", messages(PROMPT)[:1] * 2),
    ("no end", InvalidRequest, "part", messages(PROMPT)[:-1]),
    ("empty prompt", InvalidRequest, "prompt", sent(end=pb.PromptEnd())),
    ("empty part", InvalidRequest, "prompt.data", sent(PART(data=b""))),
    ("large part", InvalidRequest, "prompt.data", sent(PART(data=b"a" * ((1 << 20) + 1)))),
    ("message index", InvalidRequest, "prompt.message", sent(PART(data=b"a", message=0))),
    ("gap", PartOutOfOrder, "prompt.offset", sent(PART(data=b"a"), PART(offset=2, data=b"b"))),
    ("overlap", PartOutOfOrder, "prompt.offset", sent(PART(data=b"ab"), PART(offset=1, data=b"b"))),
    (
        "wrong total",
        PartOutOfOrder,
        "end.total_bytes",
        sent(PART(data=b"ab"), end=pb.PromptEnd(total_bytes=3)),
    ),
    (
        "wrong digest",
        DigestMismatch,
        "end.sha256",
        sent(PART(data=b"ab"), end=pb.PromptEnd(total_bytes=2, sha256=hashlib.sha256().digest())),
    ),
    (
        "not UTF-8",
        InvalidRequest,
        "prompt",
        sent(PART(data=b"ab\xff"), end=pb.PromptEnd(total_bytes=3)),
    ),
    (
        "cut UTF-8",
        InvalidRequest,
        "prompt",
        sent(PART(data="é".encode()[:1]), end=pb.PromptEnd(total_bytes=1)),
    ),
    ("too many bytes", PromptTooLong, "prompt", sent(PART(data=b"a" * 100_001))),
    ("too many tokens", PromptTooLong, "prompt", messages(b"0 " * 4_001)),
]


@pytest.mark.parametrize(
    ("kind", "field", "requests"),
    [case[1:] for case in BAD_STREAMS],
    ids=[c[0] for c in BAD_STREAMS],
)
async def test_bad_stream_is_refused_with_its_reason(drafter, kind, field, requests):
    with pytest.raises(kind) as caught:
        await drafter.send(requests)
    assert type(caught.value) is kind
    assert caught.value.field == field


async def test_too_long_prompts_name_limit_and_got(drafter):
    for prompt, limit in ((b"a" * 100_001, "100000"), (b"0 " * 4_001, "4000")):
        with pytest.raises(PromptTooLong) as caught:
            await drafter.score(prompt)
        assert caught.value.metadata["limit"] == limit
        assert int(caught.value.metadata["got"]) > int(limit)


async def test_reasons_of_an_empty_and_an_invalid_prompt_are_told_apart(drafter):
    for prompt, reason in ((b"", "PROMPT_EMPTY"), (b"ok \xf0\x28", "INVALID_UTF8")):
        with pytest.raises(InvalidRequest) as caught:
            await drafter.score(prompt)
        assert caught.value.reason == reason


async def test_invalid_utf8_that_the_tokenizer_meets_before_the_end_is_still_the_first_error(
    drafter,
):
    prompt = b"word " * 8_000 + b"\xff" + b" word" * 8_000  # pieces of 16 KiB are tokenised early
    with pytest.raises(InvalidRequest) as caught:
        await drafter.score(prompt)
    assert (caught.value.reason, caught.value.metadata["got"]) == (
        "INVALID_UTF8",
        "0xff at byte 40000",
    )


async def test_defect_in_one_request_leaves_the_next_one_whole(drafter):
    before = spans_of((await drafter.score(PROMPT)).result, PROMPT)
    drafter.backend.failure = ZeroDivisionError("a defect")
    with pytest.raises(SkimError) as caught:
        await drafter.score(PROMPT)
    assert caught.value.reason == "ENGINE_FAULT" and "defect" not in caught.value.message
    drafter.backend.failure = None
    assert spans_of((await drafter.score(PROMPT)).result, PROMPT) == before
    assert (drafter.host.queue.running, drafter.host.queue.queued) == (0, 0)


async def test_silent_caller_is_ended_after_the_idle_time():
    async with running_drafter(idle_timeout_s=0.05) as service:
        call = service.stub.Score()
        await call.write(Request(config=drafter_pb2.ScoreConfig()))
        with pytest.raises(DeadlineExceeded) as caught:
            async with errors_from_peer():
                await call.read()
        assert caught.value.reason == "IDLE_TIMEOUT"


async def test_nothing_is_scored_before_the_model_is_loaded():
    async with running_drafter(start=False) as service:
        for call in (service.score(PROMPT), service.describe()):
            with pytest.raises(Unavailable) as caught:
                async with errors_from_peer():
                    await call
            assert caught.value.reason == "MODEL_LOADING"
            assert caught.value.retry_after_s == 1.0


async def test_beginning_of_sequence_token_counts_but_keeps_no_byte_of_its_own():
    async with running_drafter(model=tiny_model("llama", add_bos=True)) as service:
        tokens = len(service.host.loaded.tokenizer.encode(PROMPT))
        result = (await service.score(PROMPT)).result
        assert result.prompt_tokens == tokens + 1
        check_canonical(spans_of(result, PROMPT), PROMPT)
        assert spans_of(result, PROMPT)[0].begin == 0
        full = await service.score(PROMPT, selection=pb.SelectionConfig(keep_ratio=1.0))
        assert spans_of(full.result, PROMPT) == [Span(0, len(PROMPT))]


async def test_messages_after_the_end_are_ignored(drafter):
    requests = [*messages(PROMPT), messages(PROMPT)[0]]
    call = drafter.stub.Score(iter_async(requests))
    assert [r.WhichOneof("event") async for r in call][-1] == "result"
