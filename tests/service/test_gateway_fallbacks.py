"""Every way in which a drafter fails: the answer still comes, and says which and why."""

from __future__ import annotations

import asyncio

import pytest

from skim.client import AsyncClient
from skim.client_types import Answer
from skim.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
    NotFound,
    PromptTooLong,
    SkimError,
    SpansNotCanonical,
    Unavailable,
)
from skim.spans import Span
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2
from skim.wire import spans_to_proto
from tests.fixtures.scripted_services import LONG, WAIT_S, House, house


def check_full(built: House, answer: Answer, reason: str) -> None:
    """The prompt was prefilled whole, exactly one plan said so, and the caller knows why."""
    assert answer.text == "The key."
    assert not answer.plan.skimmed
    assert answer.plan.full_reason == reason
    assert len(built.target.calls) == 1
    plan = built.target.calls[0].plan
    assert plan is not None
    assert pb.FullReason.Name(plan.full.reason) == f"FULL_REASON_{reason.upper()}"


async def test_a_drafter_that_is_down_is_not_asked() -> None:
    async with house(drafter_down=True) as built, AsyncClient(built.address) as client:
        answer = await client.generate(LONG)
    check_full(built, answer, "no_drafter")
    assert "drafter 'mini'" in answer.plan.detail
    assert answer.admitted.drafter == ""


async def test_a_gateway_without_drafters_says_so() -> None:
    async with house(drafters="") as built, AsyncClient(built.address) as client:
        answer = await client.generate(LONG)
    check_full(built, answer, "no_drafter")
    assert answer.plan.detail == "this gateway has no drafter"


async def test_a_drafter_that_never_answers_is_late() -> None:
    async with house(score_timeout_s=0.05) as built, AsyncClient(built.address) as client:
        built.drafter.may_run.clear()
        answer = await client.generate(LONG)
        score = built.drafter.calls[0]
        async with asyncio.timeout(WAIT_S):
            await score.ended.wait()
    check_full(built, answer, "drafter_late")
    assert score.cancelled
    assert answer.finish.timings.score_s >= 0.05


async def test_a_drafter_that_runs_too_long_is_late() -> None:
    async with house(score_timeout_s=0.05) as built, AsyncClient(built.address) as client:
        built.drafter.may_answer.clear()
        answer = await client.generate(LONG)
    check_full(built, answer, "drafter_late")
    assert "0.05 s" in answer.plan.detail


async def test_a_result_that_comes_after_the_plan_changes_nothing() -> None:
    async with house(score_timeout_s=0.05) as built, AsyncClient(built.address) as client:
        built.drafter.may_answer.clear()
        built.target.may_answer.clear()
        stream = await client.generate(LONG, stream=True)
        target = await built.target.opened()
        async with asyncio.timeout(WAIT_S):
            await target.planned.wait()
        built.drafter.may_answer.set()
        built.target.may_answer.set()
        answer = await stream.answer()
    check_full(built, answer, "drafter_late")


@pytest.mark.parametrize(
    ("stage", "word"), [(pb.STAGE_QUEUE, "queue"), (pb.STAGE_MEMORY, "memory")]
)
async def test_a_request_that_waits_outlasts_the_late_clock(stage: int, word: str) -> None:
    # Long enough for a drafter that runs to answer at once, on any machine.
    async with house(score_timeout_s=1.0) as built, AsyncClient(built.address) as client:
        built.drafter.queues, built.drafter.queue_stage = True, stage
        built.drafter.may_run.clear()
        stream = await client.generate(LONG, stream=True)
        events = aiter(stream)
        async with asyncio.timeout(WAIT_S):
            while getattr(await anext(events), "stage", "") != word:
                pass
        # A second request, given up by the same clock, shows that the limit has passed.
        built.drafter.queues = False
        late = await client.generate(LONG)
        assert late.plan.full_reason == "drafter_late"
        built.drafter.may_run.set()
        plans = [event async for event in events if hasattr(event, "skimmed")]
    assert plans[0].skimmed


async def test_a_drafter_that_dies_while_it_scores_is_survived() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.may_answer.clear()
        stream = await client.generate(LONG, stream=True)
        async with asyncio.timeout(WAIT_S):
            await (await built.drafter.opened()).uploaded.wait()
        await built.drafter_server.stop()
        answer = await stream.answer()
    check_full(built, answer, "drafter_failed")
    assert "unreachable" in answer.plan.detail
    assert "127.0.0.1" not in answer.plan.detail  # nobody's business out there


async def test_a_drafter_that_dies_during_the_upload_is_survived() -> None:
    prompt = b"hay " * 500_000
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.may_read.clear()
        stream = await client.generate(prompt, stream=True)
        await built.drafter.opened()
        await built.drafter_server.stop()
        answer = await stream.answer()
    check_full(built, answer, "drafter_failed")
    assert built.target.calls[0].prompt == prompt


async def test_a_drafter_that_takes_nothing_is_given_up() -> None:
    prompt = b"hay " * (4 << 20)  # 16 MiB: more than any window between the two
    async with house(drafter_stall_s=0.1) as built, AsyncClient(built.address) as client:
        built.drafter.may_read.clear()
        answer = await client.generate(prompt)
    check_full(built, answer, "drafter_late")
    assert built.target.calls[0].prompt == prompt


@pytest.mark.parametrize(
    "error",
    [
        Busy("the queue is full", retry_after_s=1.0),
        PromptTooLong("at most 40,960 tokens"),
        EngineFault("a defect"),
        Unavailable("swapping models", reason="SWAPPING"),
        Cancelled("somebody stopped it"),
        InvalidRequest("protected must be sorted", field="config.protected"),
        NotFound("no such model"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_drafter_that_refuses_is_survived_and_quoted(error: SkimError) -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.raises = error
        answer = await client.generate(LONG)
    check_full(built, answer, "drafter_failed")
    assert error.message in answer.plan.detail


async def test_a_drafter_that_ends_without_a_result_is_survived() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.vanishes = True
        answer = await client.generate(LONG)
    check_full(built, answer, "drafter_failed")


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        (pb.SpanSet(prompt_bytes=len(LONG), gaps=[0, 0], lengths=[5, 5]), "touches"),
        (pb.SpanSet(prompt_bytes=len(LONG), gaps=[0], lengths=[0]), "empty"),
        (pb.SpanSet(prompt_bytes=len(LONG), gaps=[0], lengths=[5, 5]), "one entry per span"),
        (pb.SpanSet(prompt_bytes=len(LONG), gaps=[0], lengths=[len(LONG) + 1]), "past"),
        (pb.SpanSet(prompt_bytes=len(LONG)), "at least one span"),
        (pb.SpanSet(prompt_bytes=4, gaps=[0], lengths=[4]), "prompt_bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_spans_that_are_not_canonical_never_reach_the_target(
    spans: pb.SpanSet, complaint: str
) -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.raw_spans = spans
        answer = await client.generate(LONG)
    check_full(built, answer, "spans_refused")
    assert complaint in answer.plan.detail


async def test_spans_that_cut_a_code_point_never_reach_the_target() -> None:
    prompt = "ü".encode() * 100
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.raw_spans = spans_to_proto([Span(1, 4)], len(prompt))
        answer = await client.generate(prompt)
    check_full(built, answer, "spans_refused")


async def test_low_coverage_asks_for_a_full_prefill_with_the_spans_to_fall_back_on() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.outcome = drafter_pb2.SELECTION_OUTCOME_LOW_COVERAGE
        built.drafter.coverage = 0.8
        answer = await client.generate(LONG, coverage=0.9)
    check_full(built, answer, "low_coverage")
    assert "0.800" in answer.plan.detail and "0.900" in answer.plan.detail
    fallback = built.target.calls[0].plan.full.fallback
    assert (list(fallback.gaps), list(fallback.lengths)) == ([0], [10])
    assert answer.plan.coverage == pytest.approx(0.8)


async def test_low_coverage_where_full_does_not_fit_is_called_degraded() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.outcome = drafter_pb2.SELECTION_OUTCOME_LOW_COVERAGE
        built.target.degraded = True
        answer = await client.generate(LONG, coverage=0.95, want_spans=True)
    assert answer.plan.degraded
    assert answer.plan.skimmed
    assert answer.plan.full_reason == ""
    assert answer.plan.detail != ""
    assert answer.plan.spans == (Span(0, 10),)


@pytest.mark.parametrize(
    "error",
    [
        SpansNotCanonical("span 0 cuts a code point"),
        InvalidRequest("plan.skim.spans must be other", field="plan.skim.spans"),
    ],
)
async def test_spans_that_the_target_refuses_become_a_full_prefill_on_a_new_call(
    error: SkimError,
) -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.refuses_once["plan"] = error
        answer = await client.generate(LONG)
    assert answer.text == "The key."
    assert answer.plan.full_reason == "spans_refused"
    assert error.message in answer.plan.detail
    first, second = built.target.calls
    assert first.plan is not None and first.plan.HasField("skim")
    assert second.plan is not None and second.plan.HasField("full")
    assert second.prompt == first.prompt == LONG
    assert second.config == first.config


async def test_what_only_the_drafter_can_refuse_in_the_callers_config_is_the_callers_error() -> (
    None
):
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.raises = InvalidRequest.field_value(
            "config.scoring.lookahead_tokens", 8, "0 for a prompt of this size"
        )
        with pytest.raises(InvalidRequest) as refused:
            await client.generate(LONG, lookahead_tokens=8)
    assert refused.value.field == "config.scoring.lookahead_tokens"


async def test_a_score_that_its_deadline_refuses_never_becomes_a_full_prefill() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.raises = DeadlineExceeded("it cannot be met")
        with pytest.raises(DeadlineExceeded):
            await client.generate(LONG)
    assert built.target.calls[0].plan is None


async def test_another_drafter_steps_in_for_a_default_that_is_down() -> None:
    # Port 1 is never ours to listen on.
    async with (
        house(drafters="first=127.0.0.1:1,second={drafter}") as built,
        AsyncClient(built.address) as client,
    ):
        answer = await client.generate(LONG)
        assert answer.plan.skimmed
        assert answer.admitted.drafter == "second"
        named = await client.generate(LONG, drafter="first")
    assert named.plan.full_reason == "no_drafter"
    assert "drafter 'first'" in named.plan.detail


async def test_an_unknown_drafter_is_not_found() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        with pytest.raises(NotFound) as refused:
            await client.generate(LONG, drafter="other")
    assert (refused.value.field, refused.value.metadata["allowed"]) == ("config.drafter", "mini")
