"""From a cancelled request to freed cells: at once, even in the middle of a long chunk."""

from __future__ import annotations

import asyncio
import time

import pytest

from skim.errors import Cancelled, DeadlineExceeded
from target_svc.engine_client import EngineClient
from target_svc.engine_stream import EngineStream
from target_svc.frames import encode
from target_svc.messages import Cancel, EngineConfig, Progress, Submit, Tokens
from tests.fixtures.engine import (
    ENDLESS_TOKENS,
    collect,
    endless,
    random_ids,
    running_engine,
    tiny_config,
    tiny_model,
)
from tests.fixtures.own_time import OwnTime

# One chunk of this takes 5 s and more on one core, in nodes of a tenth of a second: a decode can be
# aborted between two nodes of its graph, and 96 thin layers have many of them.
LONG = random_ids(2048)


def slow_model_config() -> EngineConfig:
    return tiny_config(tiny_model(layers=96), kept_max=2048, gen_max=64, n_batch=2048)


async def start_of(stream: EngineStream) -> None:
    """Wait until the first chunk begins."""
    assert await anext(stream) == Progress(stream.request_id, 0, len(LONG))


async def expect_cancelled(stream: EngineStream) -> None:
    with pytest.raises(Cancelled):
        await collect(stream)


def own_time(engine: EngineClient) -> OwnTime:
    assert engine.pid is not None
    return OwnTime(engine.pid)


async def assert_free(engine: EngineClient) -> None:
    """The only slot takes another request, and answers within a second."""
    watch = own_time(engine)
    answer = await collect(await engine.submit(Submit("next", random_ids(50), 1)))
    assert watch.seconds() <= 1.0
    assert len(answer.ids) == 1


async def test_cancel_inside_a_long_chunk_frees_the_slot_within_a_second() -> None:
    async with running_engine(slow_model_config()) as engine:
        stream = await engine.submit(Submit("a", LONG, 5))
        await start_of(stream)
        watch = own_time(engine)
        stream.cancel()
        await expect_cancelled(stream)
        await assert_free(engine)
        assert watch.seconds() <= 1.0


async def test_deadline_inside_a_long_chunk_is_kept_within_a_second() -> None:
    async with running_engine(slow_model_config()) as engine:
        watch, deadline_s = own_time(engine), time.monotonic() + 0.5
        stream = await engine.submit(Submit("a", LONG, 5, deadline_monotonic_s=deadline_s))
        with pytest.raises(DeadlineExceeded, match="ran"):
            await collect(stream)
        assert time.monotonic() >= deadline_s and watch.seconds() <= 0.5 + 1.0
        await assert_free(engine)


async def test_close_inside_a_long_chunk_takes_no_longer_than_a_second() -> None:
    async with running_engine(slow_model_config()) as engine:
        await start_of(await engine.submit(Submit("a", LONG, 5)))
        watch, closing = own_time(engine), asyncio.create_task(engine.close())
        while not closing.done():
            watch.seconds()  # the engine cannot be asked when it has ended
            await asyncio.wait({closing}, timeout=0.01)
        assert watch.seconds() <= 1.0


async def test_release_inside_a_long_chunk_of_a_cancelled_request_does_not_wait_for_it() -> None:
    async with running_engine(slow_model_config()) as engine:
        await engine.reserve(2304, "f16")
        stream = await engine.submit(Submit("a", LONG, 5, full=True))
        await start_of(stream)
        watch = own_time(engine)
        stream.cancel()
        await engine.release()
        assert watch.seconds() <= 1.0
        await expect_cancelled(stream)


async def test_cancel_of_one_of_two_decoding_requests_leaves_the_other() -> None:
    async with running_engine(slots=2, gen_max=ENDLESS_TOKENS) as engine:
        kept = await engine.submit(Submit("kept", random_ids(100, 1), 100))
        dropped = await engine.submit(endless("dropped", random_ids(100, 2)))
        async for event in dropped:
            if isinstance(event, Tokens):
                break
        dropped.cancel()
        await expect_cancelled(dropped)
        assert len((await collect(kept)).ids) == 100


async def test_cancel_while_waiting_removes_the_request() -> None:
    async with running_engine(gen_max=ENDLESS_TOKENS) as engine:
        running = await engine.submit(endless("running", random_ids(100)))
        waiting = await engine.submit(Submit("waiting", random_ids(100), 5))
        waiting.cancel()
        await expect_cancelled(waiting)
        running.cancel()


async def test_leaving_a_stream_cancels_it() -> None:
    async with running_engine(gen_max=ENDLESS_TOKENS) as engine:
        async with await engine.submit(endless("a", random_ids(100))) as stream:
            await anext(stream)
        await expect_cancelled(stream)


async def test_cancel_after_the_end_changes_nothing() -> None:
    async with running_engine() as engine:
        stream = await engine.submit(Submit("a", random_ids(100), 3))
        await collect(stream)
        stream.cancel()
        engine.cancel("a")
        # And one that was on its way while the last token came.
        engine._require_writer().write(encode(Cancel("a")))
        assert len((await collect(await engine.submit(Submit("a", random_ids(100), 3)))).ids) == 3
