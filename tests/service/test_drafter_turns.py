"""Several callers at one drafter: turns, refusals, cancelling, vanishing, deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from skim.errors import Busy, DeadlineExceeded
from skim.rpc import connect
from skim.rpc_errors import errors_from_peer
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2, drafter_pb2_grpc
from tests.fixtures.drafter_service import (
    WAIT_S,
    Answer,
    DrafterService,
    acquired,
    iter_async,
    long_text,
    messages,
    running_drafter,
    until,
)
from tests.fixtures.own_time import OwnTime

SHORT, PROMPT = long_text(2), long_text(6)
ROUNDING_S = 1e-4  # seconds travel as float32
# What the design asks for from a lost client to the freed seat.
FREED_WITHIN_S = 1.0


@pytest_asyncio.fixture
async def drafter() -> AsyncIterator[DrafterService]:
    async with running_drafter(queue_limit=2) as service:
        yield service


async def held(drafter: DrafterService, prompt: bytes = PROMPT) -> asyncio.Task[Answer]:
    """Start a Score whose pass waits at the gate."""
    drafter.backend.gate.clear()
    task = asyncio.create_task(drafter.score(prompt))
    assert await acquired(drafter.backend.begun)
    return task


async def queue_up(drafter: DrafterService, prompt: bytes, **options: Any) -> asyncio.Task[Answer]:
    """Start a Score that waits in the queue."""
    before = drafter.host.queue.queued
    task = asyncio.create_task(drafter.score(prompt, **options))
    await until(lambda: drafter.host.queue.queued > before)
    return task


async def test_two_requests_at_once_answer_as_they_do_alone(drafter):
    alone = [(await drafter.score(prompt)).result.spans for prompt in (SHORT, PROMPT)]
    together = await asyncio.gather(drafter.score(SHORT), drafter.score(PROMPT))
    assert [answer.result.spans for answer in together] == alone


async def test_waiting_request_hears_how_many_are_ahead_and_then_of_its_layers(drafter):
    marks_s = [time.monotonic()]
    first = await held(drafter)
    marks_s.append(time.monotonic())
    second = await queue_up(drafter, SHORT)
    marks_s.append(time.monotonic())
    third = await queue_up(drafter, PROMPT)
    marks_s.append(time.monotonic())
    drafter.backend.gate.set()
    answers = await asyncio.gather(first, second, third)
    queue, score = pb.STAGE_QUEUE, pb.STAGE_SCORE
    assert [event for event in answers[0].progress if event[0] == queue] == []
    assert answers[1].progress[0] == (queue, 0, 1)
    assert [event for event in answers[2].progress if event[0] == queue][:2] == [
        (queue, 0, 2),
        (queue, 1, 2),
    ]
    assert [event[0] for event in answers[2].progress][-1] == score
    began_s, first_ran_s, second_waited_s, third_waited_s = marks_s
    waits_s = [answer.result.queue_s for answer in answers]
    assert waits_s[0] <= first_ran_s - began_s + ROUNDING_S
    assert waits_s[1] >= third_waited_s - second_waited_s - ROUNDING_S > 0.0
    assert waits_s[2] > 0.0


async def test_description_counts_those_who_wait_and_run(drafter):
    first = await held(drafter)
    second = await queue_up(drafter, SHORT)
    seen = await drafter.describe()
    assert (seen.running, seen.queued, seen.queue_limit, seen.tokens_per_s) == (1, 1, 2, 0.0)
    drafter.backend.gate.set()
    await asyncio.gather(first, second)
    seen = await drafter.describe()
    assert (seen.running, seen.queued) == (0, 0)
    assert seen.tokens_per_s > 0


async def test_earliest_deadline_is_scored_first(drafter):
    first = await held(drafter)
    late = await queue_up(drafter, SHORT, timeout=500)
    soon = await queue_up(drafter, PROMPT, timeout=100)
    drafter.backend.gate.set()
    tokens = [task.result.prompt_tokens for task in await asyncio.gather(first, soon, late)]
    assert tokens[1] != tokens[2]
    assert [request.num_tokens for request in drafter.backend.requests] == tokens


async def test_full_queue_is_refused_with_a_retry_hint(drafter):
    await drafter.score(PROMPT)
    first = await held(drafter)
    waiting = [await queue_up(drafter, PROMPT) for _ in range(2)]
    with pytest.raises(Busy) as caught:
        await drafter.score(PROMPT)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.metadata == {"limit": "2", "got": "3"}
    rate = drafter.host.queue.rate.mean
    tokens = drafter.host.queue._waiting[0].tokens
    assert 2 * tokens / rate <= caught.value.retry_after_s + 1e-6 <= 3 * tokens / rate + 1e-6
    drafter.backend.gate.set()
    assert all(answer.result for answer in await asyncio.gather(first, *waiting))
    assert (await drafter.score(PROMPT)).result


async def test_full_queue_is_refused_before_the_prompt_is_uploaded(drafter):
    first = await held(drafter)
    waiting = [await queue_up(drafter, PROMPT) for _ in range(2)]
    with pytest.raises(Busy):
        await drafter.send(messages(PROMPT)[:1])  # no part, no end
    drafter.backend.gate.set()
    await asyncio.gather(first, *waiting)


async def test_cancelling_in_the_queue_frees_the_place_at_once(drafter):
    first = await held(drafter)
    second = await queue_up(drafter, SHORT)
    third = await queue_up(drafter, PROMPT)
    second.cancel()
    await until(lambda: drafter.host.queue.queued == 1)
    assert drafter.backend.stopped.acquire(blocking=False) is False
    drafter.backend.gate.set()
    assert (await first).result and (await third).result
    assert len(drafter.backend.requests) == 2


async def test_cancelling_during_the_pass_stops_it_and_the_next_one_runs(drafter):
    first = await held(drafter)
    second = await queue_up(drafter, SHORT)
    watch = OwnTime()
    first.cancel()
    assert await acquired(drafter.backend.stopped)
    assert await acquired(drafter.backend.begun)  # the second one's
    assert watch.seconds() < FREED_WITHIN_S
    drafter.backend.gate.set()
    assert (await second).result


async def test_pass_of_a_real_model_stops_within_a_second_of_cancelling(drafter):
    # About 30,000 tokens, every block of every row: many seconds of work.
    dense = pb.ScoringConfig(alpha=0.0, max_density=1.0)
    begun = asyncio.create_task(drafter.score(long_text(500), scoring=dense))
    assert await acquired(drafter.backend.begun)
    watch = OwnTime()
    begun.cancel()
    await until(lambda: drafter.host.queue.running == 0)
    assert watch.seconds() < FREED_WITHIN_S


class Wire:
    """A TCP relay to a server that can be torn like the connection of a host that died."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.tear()
        self._server.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def tear(self) -> None:
        """Drop every connection without a word of HTTP/2."""
        for writer in self._writers:
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, up_writer]
        for source, sink in ((reader, up_writer), (up_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass


@pytest.mark.parametrize("waiting", [False, True], ids=["in the pass", "in the queue"])
async def test_caller_that_vanishes_frees_its_work_within_a_second(drafter, waiting):
    first = await held(drafter) if waiting else None
    drafter.backend.gate.clear()
    queue = drafter.host.queue
    async with Wire(drafter.server.port) as wire:
        channel = connect(f"127.0.0.1:{wire.port}")
        stub = drafter_pb2_grpc.DrafterServiceStub(channel)
        call = stub.Score(iter_async(messages(PROMPT)))
        reading = asyncio.create_task(call.read())
        await until(lambda: queue.queued == 1 if waiting else queue.running == 1)
        watch = OwnTime()
        wire.tear()
        await until(lambda: queue.queued == 0 and queue.running == int(waiting))
        assert watch.seconds() < FREED_WITHIN_S
        await asyncio.gather(reading, return_exceptions=True)
        await channel.close()
    drafter.backend.gate.set()
    if first is not None:
        assert (await first).result
    assert (await drafter.score(SHORT)).result


async def test_caller_that_vanishes_while_uploading_frees_its_stream(drafter):
    call = drafter.stub.Score()
    await call.write(messages(PROMPT)[0])
    await until(lambda: drafter.host._streams == 1)
    call.cancel()
    await until(lambda: drafter.host._streams == 0)


async def test_deadline_that_passes_in_the_queue_ends_the_request_alone(drafter):
    first = await held(drafter)
    with pytest.raises(DeadlineExceeded):
        await drafter.score(SHORT, timeout=0.2)
    await until(lambda: drafter.host.queue.queued == 0)
    drafter.backend.gate.set()
    assert (await first).result


async def test_deadline_that_passes_in_the_pass_stops_it(drafter):
    drafter.backend.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await drafter.score(SHORT, timeout=0.3)
    assert await acquired(drafter.backend.stopped)
    await until(lambda: drafter.host.queue.running == 0)


async def test_deadline_that_cannot_be_met_is_refused_up_front(drafter):
    drafter.host.queue.rate.add(4_096, 4_096 * 60.0)  # a token a minute
    with pytest.raises(DeadlineExceeded) as caught:
        await drafter.score(SHORT, timeout=WAIT_S)
    assert caught.value.reason == "DEADLINE_TOO_SHORT"
    assert float(caught.value.metadata["got"]) > float(caught.value.metadata["limit"])
    assert drafter.backend.requests == []


async def test_next_prompt_is_tokenised_beside_the_pass_of_this_one(drafter):
    first = await held(drafter)
    second = await queue_up(drafter, SHORT)  # in the queue: its tokens are counted
    assert drafter.host.queue._waiting[0].tokens > 0
    assert drafter.host.queue.running == 1
    drafter.backend.gate.set()
    await asyncio.gather(first, second)


async def test_more_streams_than_allowed_are_refused():
    async with running_drafter(streams_limit=1) as service:
        call = service.stub.Score()
        await call.write(drafter_pb2.ScoreRequest(config=drafter_pb2.ScoreConfig()))
        await until(lambda: service.host._streams == 1)
        with pytest.raises(Busy) as caught:
            await service.score(SHORT)
        assert caught.value.reason == "STREAMS_LIMIT"
        call.cancel()
        await until(lambda: service.host._streams == 0)
        assert (await service.score(SHORT)).result


async def test_failing_callers_do_not_wear_the_queue_out(drafter):
    for _ in range(5):
        drafter.backend.gate.clear()
        call = drafter.stub.Score(iter_async(messages(SHORT)))
        assert await acquired(drafter.backend.begun)
        call.cancel()
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            async with errors_from_peer():
                await call.read()
        await until(lambda: drafter.host.queue.running == 0)
    drafter.backend.gate.set()
    assert (await drafter.score(SHORT)).result
    await until(lambda: drafter.host._streams == 0)
