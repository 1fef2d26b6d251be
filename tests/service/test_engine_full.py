"""The full context: made on request, used, freed, with all its memory."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from skim.errors import Busy, Cancelled, PreconditionFailed, PromptTooLong
from target_svc.messages import Submit, Tokens
from tests.fixtures.engine import collect, random_ids, running_engine

LONG = random_ids(1500)  # the working context of these tests has 768 cells


async def test_prompt_too_long_for_the_working_context_runs_in_the_full_one() -> None:
    async with running_engine() as engine:
        with pytest.raises(PromptTooLong):
            await collect(await engine.submit(Submit("a", LONG, 5)))
        reserved = await engine.reserve(2048, "f16")
        answer = await collect(await engine.submit(Submit("b", LONG, 5, full=True)))
        await engine.release()
    assert reserved.cells == 2048 and reserved.create_s > 0 and reserved.warm_s > 0
    assert len(answer.ids) == 5


async def test_full_context_answers_as_the_working_one() -> None:
    prompt = random_ids(300)
    async with running_engine() as engine:
        working = await collect(await engine.submit(Submit("a", prompt, 10)))
        await engine.reserve(4096, "f16")
        full = await collect(await engine.submit(Submit("b", prompt, 10, full=True)))
        await engine.release()
    assert full.ids == working.ids


async def test_both_contexts_run_side_by_side() -> None:
    async with running_engine() as engine:
        await engine.reserve(2048, "f16")
        streams = [
            await engine.submit(Submit("full", LONG, 20, full=True)),
            await engine.submit(Submit("working", random_ids(100), 20)),
        ]
        answers = await asyncio.gather(*map(collect, streams))
    assert [len(answer.ids) for answer in answers] == [20, 20]


async def test_memory_returns_when_the_full_context_is_released() -> None:
    async with running_engine() as engine:
        child = psutil.Process(engine.pid)
        for _ in range(3):  # the first ones also grow the allocator's own pools
            await engine.reserve(131_072, "f16")
            await engine.release()
        before = child.memory_info().rss
        await engine.reserve(131_072, "f16")
        grown = child.memory_info().rss - before
        await engine.release()
        for _ in range(3):
            await engine.reserve(131_072, "f16")
            await engine.release()
        left = child.memory_info().rss - before
    assert grown >= 131_072 * 512  # bytes a cell: 2 layers x (K, V) x 64 values x 2
    # Four cycles that each kept a sixteenth of the context would fail; the allocator's own pools
    # come and go by about 9 MB, an eighth.
    assert left <= grown / 4


async def test_second_reservation_is_refused() -> None:
    async with running_engine() as engine:
        await engine.reserve(1024, "f16")
        with pytest.raises(PreconditionFailed) as caught:
            await engine.reserve(1024, "f16")
        assert caught.value.reason == "FULL_RESERVED"
        await engine.release()
        assert (await engine.reserve(1024, "q8_0")).cells == 1024


async def test_reservation_beyond_the_hosts_memory_is_refused_and_the_engine_goes_on() -> None:
    async with running_engine() as engine:
        with pytest.raises(Busy, match="bytes, .* are free") as caught:
            await engine.reserve(2**31 - 1, "f16")
        assert caught.value.reason == "CONTEXT_MEMORY"
        assert engine.full is None
        await engine.reserve(1024, "f16")
        assert engine.restarts == 0


async def test_release_without_a_reservation_is_no_effect() -> None:
    async with running_engine() as engine:
        await engine.release()
        assert engine.full is None


async def test_release_fails_requests_that_still_run_in_it() -> None:
    async with running_engine() as engine:
        await engine.reserve(2048, "f16")
        stream = await engine.submit(Submit("a", LONG, 400, full=True, speculate=False))
        async for event in stream:
            if isinstance(event, Tokens):
                break
        await engine.release()
        with pytest.raises(Cancelled, match="released"):
            await collect(stream)
        assert len((await collect(await engine.submit(Submit("b", random_ids(9), 2)))).ids) == 2


async def test_abandoned_reservation_is_taken_back() -> None:
    async with running_engine() as engine:
        task = asyncio.create_task(engine.reserve(131_072, "f16"))
        await asyncio.sleep(0)  # let it send
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.reserve(1024, "f16")).cells == 1024
