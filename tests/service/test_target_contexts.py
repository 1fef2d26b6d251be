"""Working and full contexts, degraded answers, and original positions."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from skim.errors import Busy
from skim.v1 import common_pb2 as pb
from skim.v1 import target_pb2
from tests.fixtures.engine import tiny_model
from tests.fixtures.target import (
    RunningTarget,
    ask,
    config,
    full,
    messages,
    running_target,
    skim,
    until,
)
from tests.service.test_target_generate import TEXT

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = TEXT.encode()  # 150 tokens
LONGER = (TEXT * 2).encode()  # 300 tokens
FREE = config(max_tokens=24, ignore_eos=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target() -> AsyncIterator[RunningTarget]:
    """A slot for 64 prompt tokens, full contexts for 200."""
    async with running_target(kept_max=64, full_max_tokens=200) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def roomy() -> AsyncIterator[RunningTarget]:
    async with running_target() as running:
        yield running


async def full_contexts(target: RunningTarget) -> bool:
    return (await target.load()).full_context


async def no_full_context(target: RunningTarget) -> None:
    async def gone() -> bool:
        return not await full_contexts(target)

    await until(gone)


async def test_a_full_context_gives_the_working_context_s_answer_and_goes(
    target: RunningTarget, roomy: RunningTarget
) -> None:
    answer = await ask(target, PROMPT, settings=FREE)
    assert answer.tokenised.full_fits and not answer.started.degraded
    assert answer.ids == (await ask(roomy, PROMPT, settings=FREE)).ids
    await no_full_context(target)


async def test_the_full_context_exists_while_its_request_runs(target: RunningTarget) -> None:
    seen = []
    stream = target.stub.Generate(iter(stream_of(PROMPT)))
    async for response in stream:
        if response.HasField("tokens") and not seen:
            seen.append(await full_contexts(target))
    assert seen == [True]
    await no_full_context(target)


def stream_of(prompt: bytes) -> list[target_pb2.TargetServiceGenerateRequest]:
    return messages(prompt, full(), FREE)


async def test_requests_for_full_contexts_take_turns(target: RunningTarget) -> None:
    answers = await asyncio.gather(*(ask(target, PROMPT, settings=FREE) for _ in range(3)))
    assert answers[0].ids == answers[1].ids == answers[2].ids
    assert max(len(answer.queue) for answer in answers) >= 1
    await no_full_context(target)


async def test_a_prompt_past_every_context_is_answered_from_the_fallback_and_says_so(
    target: RunningTarget,
) -> None:
    spans = ((0, 40), (500, 560))
    answer = await ask(target, LONGER, full(LONGER, *spans), FREE)
    assert not answer.tokenised.full_fits
    assert answer.started.degraded
    skimmed = await ask(target, LONGER, skim(LONGER, *spans), FREE)
    assert not skimmed.started.degraded and skimmed.ids == answer.ids
    assert answer.finish.usage.kept_tokens == skimmed.finish.usage.kept_tokens < 64


async def test_a_fallback_is_not_used_where_the_whole_prompt_fits(target: RunningTarget) -> None:
    answer = await ask(target, PROMPT, full(PROMPT, (0, 10)), FREE)
    assert not answer.started.degraded
    assert answer.finish.usage.kept_tokens == answer.finish.usage.prompt_tokens


async def test_without_a_fallback_it_is_refused_with_limit_and_got(target: RunningTarget) -> None:
    with pytest.raises(Busy) as refused:
        await ask(target, LONGER)
    assert refused.value.reason == "FULL_PREFILL_IMPOSSIBLE"
    assert refused.value.metadata == {"limit": "200", "got": "300"}
    assert refused.value.retry_after_s is None


async def test_more_kept_tokens_than_a_slot_takes_run_in_a_full_context(
    target: RunningTarget, roomy: RunningTarget
) -> None:
    plan = skim(LONGER, (0, 400))
    answer = await ask(target, LONGER, plan, FREE)
    assert answer.finish.usage.kept_tokens > 64
    assert answer.ids == (await ask(roomy, LONGER, plan, FREE)).ids


async def test_more_kept_tokens_than_any_context_takes_are_refused(target: RunningTarget) -> None:
    with pytest.raises(Busy) as refused:
        await ask(target, LONGER, skim(LONGER, (0, 800)))
    assert refused.value.reason == "FULL_PREFILL_IMPOSSIBLE"


async def test_an_engine_that_dies_with_a_full_context_leaves_none_behind(
    target: RunningTarget,
) -> None:
    stream = target.stub.Generate(iter(stream_of(PROMPT)))
    async for response in stream:
        if response.HasField("started"):
            break
    os.kill(target.target.engine.pid, signal.SIGKILL)
    stream.cancel()
    assert (await ask(target, PROMPT, settings=FREE)).finish is not None
    await no_full_context(target)


async def test_the_description_states_the_limit_of_full_prefills(target: RunningTarget) -> None:
    found = await target.stub.GetTarget(target_pb2.GetTargetRequest())
    assert (found.kept_max_tokens, found.full_max_tokens) == (64, 200)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mrope() -> AsyncIterator[RunningTarget]:
    """The very weights of the plain model, under the name whose rope allows gaps."""
    async with running_target(tiny_model("qwen3vl")) as running:
        yield running


async def test_without_gaps_the_relabelled_model_answers_like_the_plain_one(
    mrope: RunningTarget, roomy: RunningTarget
) -> None:
    settings = config(max_tokens=24, ignore_eos=True, logprobs=0)
    plain = await ask(roomy, PROMPT, settings=settings)
    relabelled = await ask(mrope, PROMPT, settings=settings)
    assert relabelled.ids == plain.ids
    assert [entry.chosen.logprob for entry in relabelled.logprobs] == [
        entry.chosen.logprob for entry in plain.logprobs
    ]
    assert relabelled.started.positions == pb.POSITION_MODE_ORIGINAL


async def test_original_positions_are_the_default_where_the_rope_allows_gaps(
    mrope: RunningTarget,
) -> None:
    spans = ((0, 60), (200, 260))
    default = await ask(mrope, PROMPT, skim(PROMPT, *spans), FREE)
    asked = await ask(
        mrope,
        PROMPT,
        skim(PROMPT, *spans),
        config(max_tokens=24, ignore_eos=True, positions=pb.POSITION_MODE_ORIGINAL),
    )
    assert default.started.positions == asked.started.positions == pb.POSITION_MODE_ORIGINAL
    assert default.ids == asked.ids


async def test_compacted_on_the_relabelled_model_equals_compacted_on_the_plain_one(
    mrope: RunningTarget, roomy: RunningTarget
) -> None:
    plan = skim(PROMPT, (0, 60), (200, 260))
    settings = config(max_tokens=24, ignore_eos=True, positions=pb.POSITION_MODE_COMPACTED)
    compacted = await ask(mrope, PROMPT, plan, settings)
    assert compacted.started.positions == pb.POSITION_MODE_COMPACTED
    assert compacted.ids == (await ask(roomy, PROMPT, plan, settings)).ids


async def test_gaps_reach_the_model(mrope: RunningTarget) -> None:
    plan = skim(PROMPT, (0, 60), (200, 260))
    answers = []
    for positions in (pb.POSITION_MODE_ORIGINAL, pb.POSITION_MODE_COMPACTED):
        settings = config(max_tokens=1, ignore_eos=True, positions=positions, logprobs=0)
        answers.append(await ask(mrope, PROMPT, plan, settings))
    original, compacted = (answer.logprobs[0].chosen.logprob for answer in answers)
    assert original != compacted


async def test_past_the_trained_context_positions_are_compacted(mrope: RunningTarget) -> None:
    prompt = TEXT.encode() * 28  # 4,200 tokens; the tiny model says it was trained to 4,096
    answer = await ask(mrope, prompt, skim(prompt, (0, 60)), FREE)
    assert answer.tokenised.prompt_tokens > 4_096
    assert answer.started.positions == pb.POSITION_MODE_COMPACTED
