"""Requests through a real engine child: answers, limits, refusals, the queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio

from skim.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    PreconditionFailed,
    PromptTooLong,
    SkimError,
)
from target_svc.engine_client import EngineClient
from target_svc.messages import Done, Progress, Submit, Tokens
from target_svc.sampling import Sampling
from tests.fixtures.engine import (
    ENDLESS_TOKENS,
    collect,
    endless,
    random_ids,
    running_engine,
    tiny_config,
    tiny_model,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = random_ids(150)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine() -> AsyncIterator[EngineClient]:
    """One engine for all tests that need no special one; each leaves it idle."""
    async with running_engine() as client:
        yield client


async def test_facts_describe_model_and_context() -> None:
    async with running_engine(slots=2) as engine:
        facts = await engine.ready()
    assert (facts.architecture, facts.n_vocab, facts.n_ctx_train) == ("qwen3", 645, 4096)
    assert (facts.rope_type, facts.allows_gaps, facts.can_rollback) == ("neox", False, True)
    assert (facts.slots, facts.cells, facts.cells_per_slot, facts.n_batch) == (2, 1536, 768, 64)
    assert facts.eog_ids.tolist() == [640, 642]
    # 2 layers x (K, V) x 2 heads x 32 values x 2 bytes = 512, and the cell's own record.
    assert 512 <= facts.kv_bytes_per_cell <= 512 + 32


async def test_answer_reports_progress_tokens_and_counts(engine: EngineClient) -> None:
    answer = await collect(await engine.submit(Submit("a", PROMPT, 20)))
    done = answer.done
    assert answer.progress[-1] == (150, 150)  # those before may be merged
    assert done is not None and (done.reason, done.stop_id) == ("length", -1)
    assert (done.prompt_tokens, done.output_tokens, len(answer.ids)) == (150, 20, 20)
    assert done.accepted_tokens <= done.draft_tokens and done.steps >= 3
    assert 0 < done.prefill_s and 0 < done.decode_s and 0 <= done.queue_s


async def test_chunks_do_not_change_the_answer() -> None:
    answers = []
    for n_batch in (32, 256):
        async with running_engine(n_batch=n_batch) as engine:
            answers.append((await collect(await engine.submit(Submit("a", PROMPT, 8)))).ids)
    assert answers[0] == answers[1]


async def test_stop_token_ends_the_answer_and_is_not_sent(engine: EngineClient) -> None:
    free = await collect(await engine.submit(Submit("a", PROMPT, 20)))
    stop = free.ids[6]
    first = free.ids.index(stop)
    stopped = await collect(
        await engine.submit(Submit("b", PROMPT, 20, stop_ids=np.array([stop], np.int32)))
    )
    assert stopped.ids == free.ids[:first]
    assert stopped.done is not None and (stopped.done.reason, stopped.done.stop_id) == (
        "stop",
        stop,
    )


async def test_ignored_ends_run_to_max_tokens(engine: EngineClient) -> None:
    everything = np.arange(645, dtype=np.int32)
    submit = Submit("a", PROMPT, 9, stop_ids=everything)
    at_once = await collect(await engine.submit(submit))
    ignored = await collect(await engine.submit(replace(submit, request_id="b", ignore_eos=True)))
    assert at_once.ids == [] and len(ignored.ids) == 9


async def test_logprobs_describe_the_greedy_choice(engine: EngineClient) -> None:
    submit = Submit("a", PROMPT, 6, sampling=Sampling(top_logprobs=3), speculate=False)
    answer = await collect(await engine.submit(submit))
    assert len(answer.logprobs) == 6 and len(answer.top_ids) == len(answer.top_logprobs) == 18
    assert answer.top_ids[::3] == answer.ids and answer.top_logprobs[::3] == answer.logprobs


async def test_seed_decides_a_sampled_answer(engine: EngineClient) -> None:
    answers = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        stream = await engine.submit(Submit(name, PROMPT, 12, sampling=sampling))
        answers.append((await collect(stream)).ids)
    assert answers[0] == answers[1] != answers[2]


async def test_requests_in_parallel_answer_as_they_do_alone() -> None:
    prompts = [random_ids(90 + 40 * i, seed=i) for i in range(3)]
    async with running_engine(slots=3) as engine:
        alone = [
            (await collect(await engine.submit(Submit(f"alone-{i}", ids, 16)))).ids
            for i, ids in enumerate(prompts)
        ]
        streams = [
            await engine.submit(Submit(f"together-{i}", ids, 16)) for i, ids in enumerate(prompts)
        ]
        together = [answer.ids for answer in await asyncio.gather(*map(collect, streams))]
    assert together == alone


async def test_decoding_goes_on_while_another_prompt_is_prefilled() -> None:
    async with running_engine(slots=2, n_batch=32, gen_max=ENDLESS_TOKENS) as engine:
        first = await engine.submit(endless("first", PROMPT))
        async for event in first:
            if isinstance(event, Tokens):
                break
        second = await engine.submit(Submit("second", random_ids(400, 1), 1))
        seen = [event async for event in second]
        assert engine.load.decoding >= 1 and sum(isinstance(e, Done) for e in seen) == 1
        first.cancel()
        decoded = 0
        with pytest.raises(Cancelled):
            async for event in first:
                decoded += len(event.ids) if isinstance(event, Tokens) else 0
        assert decoded >= 13  # one for each chunk of the second prompt


async def test_second_request_waits_for_the_only_slot(engine: EngineClient) -> None:
    first = await engine.submit(Submit("first", PROMPT, 100, speculate=False))
    second = await engine.submit(Submit("second", PROMPT, 5))
    answers = await asyncio.gather(collect(first), collect(second))
    first_done, second_done = answers[0].done, answers[1].done
    assert first_done is not None and second_done is not None
    first_ended_s = first_done.first_token_monotonic_s + first_done.decode_s
    assert second_done.first_token_monotonic_s - second_done.prefill_s >= first_ended_s


async def test_request_waits_for_cells_though_a_slot_is_free() -> None:
    async with running_engine(slots=2) as engine:  # 1,536 cells
        streams = [
            await engine.submit(Submit(f"r{i}", random_ids(900, i), 100, ignore_eos=True))
            for i in range(2)
        ]
        answers = await asyncio.gather(*map(collect, streams))
    assert [len(answer.ids) for answer in answers] == [100, 100]


async def test_slow_reader_gets_merged_events_and_every_token(engine: EngineClient) -> None:
    unread = await engine.submit(Submit("unread", PROMPT, 100))
    await collect(await engine.submit(Submit("after", PROMPT, 1)))
    answer = await collect(unread)
    assert len(answer.ids) == 100
    assert answer.events <= 3 and answer.progress == [(150, 150)]


async def test_queue_bound_refuses_one_more() -> None:
    async with running_engine(max_waiting=1, gen_max=ENDLESS_TOKENS) as engine:
        running = await engine.submit(endless("running", PROMPT))
        assert isinstance(await anext(running), Progress)  # it holds the slot
        waiting = await engine.submit(Submit("waiting", PROMPT, 5))
        refused = await engine.submit(Submit("refused", PROMPT, 5))
        with pytest.raises(Busy):
            await collect(refused)
        running.cancel()
        assert len((await collect(waiting)).ids) == 5


async def test_deadline_that_passed_fails_the_request(engine: EngineClient) -> None:
    late = Submit("a", PROMPT, 5, deadline_monotonic_s=time.monotonic() - 0.001)
    with pytest.raises(DeadlineExceeded):
        await collect(await engine.submit(late))


async def test_deadline_ends_a_request_while_it_waits() -> None:
    async with running_engine(gen_max=ENDLESS_TOKENS) as engine:
        await anext(await engine.submit(endless("running", PROMPT)))
        soon = Submit("late", PROMPT, 5, deadline_monotonic_s=time.monotonic() + 0.02)
        with pytest.raises(DeadlineExceeded, match="waited"):
            await collect(await engine.submit(soon))


IDS = random_ids(10)
REFUSED = [
    ("empty", Submit("a", IDS[:0], 5), InvalidRequest, "ids"),
    ("id past the vocabulary", Submit("a", np.array([645], np.int32), 5), InvalidRequest, "ids"),
    ("negative id", Submit("a", np.array([-1], np.int32), 5), InvalidRequest, "ids"),
    (
        "original id past the vocabulary",
        Submit("a", IDS, 5, original_ids=np.array([645], np.int32)),
        InvalidRequest,
        "original_ids",
    ),
    ("no tokens wanted", Submit("a", IDS, 0), InvalidRequest, "max_tokens"),
    ("NaN", Submit("a", IDS, 5, sampling=Sampling(min_p=2.0)), InvalidRequest, "min_p"),
    ("too long", Submit("a", random_ids(600), 200), PromptTooLong, "cells"),
    (
        "fewer positions than ids",
        Submit("a", IDS, 5, positions=np.arange(9, dtype=np.int32)),
        InvalidRequest,
        "positions",
    ),
    (
        "repeated position",
        Submit("a", IDS[:3], 5, positions=np.array([0, 1, 1], np.int32)),
        InvalidRequest,
        "positions",
    ),
    (
        "negative position",
        Submit("a", IDS[:2], 5, positions=np.array([-1, 0], np.int32)),
        InvalidRequest,
        "positions",
    ),
    ("answer inside the prompt", Submit("a", IDS, 5, next_position=9), InvalidRequest, "next"),
    (
        "answer past the last position",
        Submit("a", IDS, 5, next_position=2**31 - 3),
        InvalidRequest,
        "next_position",
    ),
    (
        "gap in the prompt",
        Submit("a", IDS[:3], 5, positions=np.array([0, 1, 3], np.int32)),
        PreconditionFailed,
        "gaps",
    ),
    ("gap before the answer", Submit("a", IDS, 5, next_position=11), PreconditionFailed, "gaps"),
    ("no full context", Submit("a", IDS, 5, full=True), PreconditionFailed, "full"),
]


async def test_bad_requests_are_refused_and_the_engine_goes_on(engine: EngineClient) -> None:
    for index, (name, submit, kind, words) in enumerate(REFUSED):
        stream = await engine.submit(replace(submit, request_id=f"bad-{index}"))
        with pytest.raises(SkimError, match=words) as caught:
            await collect(stream)
        assert type(caught.value) is kind, name
    assert len((await collect(await engine.submit(Submit("good", PROMPT, 3)))).ids) == 3
    assert engine.restarts == 0


async def test_request_id_in_use_is_refused(engine: EngineClient) -> None:
    stream = await engine.submit(Submit("same", PROMPT, 3))
    with pytest.raises(InvalidRequest):
        await engine.submit(Submit("same", PROMPT, 3))
    assert len((await collect(stream)).ids) == 3


async def test_prompt_that_fills_its_context_exactly_is_answered() -> None:
    async with running_engine(kept_max=200, gen_max=56) as engine:
        answer = await collect(await engine.submit(Submit("a", random_ids(200), 56)))
    assert len(answer.ids) == 56


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
async def test_kv_cache_types_answer(kv_type: str) -> None:
    async with running_engine(kv_type=kv_type) as engine:
        facts = await engine.ready()
        assert len((await collect(await engine.submit(Submit("a", PROMPT, 3)))).ids) == 3
    # 256 values a cell, in blocks of 32: 64, 34 and 18 bytes.
    block_bytes = {"f16": 64, "q8_0": 34, "q4_0": 18}[kv_type]
    assert 8 * block_bytes <= facts.kv_bytes_per_cell <= 8 * block_bytes + 32


@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3vl"])
async def test_other_architectures_answer(arch: str) -> None:
    async with running_engine(tiny_config(tiny_model(arch))) as engine:
        facts = await engine.ready()
        assert facts.architecture == arch and facts.allows_gaps == (arch == "qwen3vl")
        assert len((await collect(await engine.submit(Submit("a", PROMPT, 3)))).ids) == 3


async def test_engine_without_flash_attention_answers() -> None:
    async with running_engine(flash_attention=False) as engine:
        assert len((await collect(await engine.submit(Submit("a", PROMPT, 3)))).ids) == 3


async def test_load_returns_to_idle(engine: EngineClient) -> None:
    await collect(await engine.submit(Submit("a", PROMPT, 10)))
    await engine.reserve(256, "f16")  # answered after the Load that follows the last token
    load = engine.load
    await engine.release()
    assert (load.running, load.waiting, load.cells_used, load.cells) == (0, 0, 0, 768)
    assert load.prefill_tokens_per_s > 0 and load.decode_tokens_per_s > 0
