"""Callers that leave, engines that die, queues that fill: the target goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from skim.errors import Busy, DeadlineExceeded, Unavailable
from skim.rpc_errors import from_rpc_error
from skim.v1 import common_pb2 as pb
from tests.fixtures.own_time import OwnTime
from tests.fixtures.target import (
    Answer,
    RunningTarget,
    ask,
    config,
    full,
    messages,
    running_target,
    send,
    until,
)
from tests.service.test_target_generate import TEXT

pytestmark = pytest.mark.asyncio(loop_scope="module")

# About 12,000 tokens: seconds of prefill for the tiny model on one thread.
LONG = (TEXT * 80).encode()
# From a lost client to the freed sequence.
FREED_S = 1.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target() -> AsyncIterator[RunningTarget]:
    async with running_target(kept_max=16_384, batch=2_048, queue_limit=1) as running:
        yield running


# A client on its own: it prints when its prefill runs, and never ends by itself.
CLIENT = """
import asyncio
from skim.rpc import connect
from skim.v1 import target_pb2 as pb, target_pb2_grpc as rpc
from skim.wire import prompt_end, split_parts
prompt = b"Nothing here. " * 2_000
requests = [
    pb.TargetServiceGenerateRequest(config=pb.TargetGenerateConfig()),
    *(pb.TargetServiceGenerateRequest(prompt=part) for part in split_parts(prompt)),
    pb.TargetServiceGenerateRequest(end=prompt_end(prompt)),
    pb.TargetServiceGenerateRequest(plan=pb.Plan(full=pb.FullPlan())),
]
async def main():
    stub = rpc.TargetServiceStub(connect({address!r}))
    async for response in stub.Generate(iter(requests)):
        if response.progress.done:
            print("prefilling", flush=True)
asyncio.run(main())
"""


class Call:
    """An open stream whose events are read one by one."""

    def __init__(self, target: RunningTarget, prompt: bytes = LONG, **options: Any) -> None:
        settings = config(max_tokens=64, ignore_eos=True)
        self.answer = Answer()
        self.call = target.stub.Generate(iter(messages(prompt, full(), settings)), **options)
        self._events = aiter(self.call)

    async def reach(self, kind: str, *, prefilled: int = 0) -> None:
        """Read until an event of this kind, and for `progress` until so many are prefilled."""
        async with asyncio.timeout(30):
            async for response in self._events:
                found = self.answer.take(response)
                if found == kind and (not prefilled or response.progress.done >= prefilled):
                    return
        raise AssertionError(f"the stream ended without {kind}")

    async def finish(self) -> Answer:
        """Read to the end; raises what the server answered."""
        try:
            async for response in self._events:
                self.answer.take(response)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from failure
        return self.answer


def own_time(target: RunningTarget) -> OwnTime:
    pid = target.target.engine.pid
    assert pid is not None
    return OwnTime(pid)


async def one_behind_the_other(target: RunningTarget, prompt: bytes) -> tuple[Call, Call]:
    """A call that prefills for seconds, and one with `prompt` that waits for its slot."""
    first = Call(target)
    await first.reach("started")
    second = Call(target, prompt)
    await second.reach("progress")
    assert second.answer.queue == [(0, 1)]
    return first, second


async def test_a_cancel_inside_the_prefill_frees_the_sequence_within_a_second(
    target: RunningTarget,
) -> None:
    call = Call(target)
    await call.reach("progress", prefilled=2_048)
    watch = own_time(target)
    call.call.cancel()
    await until(target.idle)
    assert watch.seconds() < FREED_S
    assert call.answer.prefill[-1][0] < call.answer.prefill[-1][1]


async def test_a_cancel_between_tokens_frees_the_sequence_within_a_second(
    target: RunningTarget,
) -> None:
    call = Call(target, TEXT.encode())
    await call.reach("tokens")
    watch = own_time(target)
    call.call.cancel()
    await until(target.idle)
    assert watch.seconds() < FREED_S


async def test_a_client_process_that_is_killed_frees_its_sequence_within_a_second(
    target: RunningTarget,
) -> None:
    program = CLIENT.format(address=f"127.0.0.1:{target.server.port}")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert b"prefilling" in await process.stdout.readline()
    watch = own_time(target)
    process.kill()
    await until(target.idle)
    assert watch.seconds() < FREED_S
    await process.wait()


async def test_a_deadline_inside_the_prefill_ends_the_call_and_frees_the_sequence(
    target: RunningTarget,
) -> None:
    with pytest.raises(DeadlineExceeded):
        await Call(target, timeout=0.5).finish()
    watch = own_time(target)
    await until(target.idle)
    assert watch.seconds() < FREED_S


async def test_who_must_wait_hears_how_many_are_ahead_and_one_more_is_refused(
    target: RunningTarget,
) -> None:
    first, second = await one_behind_the_other(target, TEXT.encode())
    load = await target.load()
    assert (load.queued, load.queue_limit, load.running, load.slots) == (1, 1, 1, 1)
    with pytest.raises(Busy) as refused:
        await ask(target, TEXT)
    assert refused.value.reason == "QUEUE_FULL" and refused.value.retry_after_s > 0.0
    first.call.cancel()
    assert (await second.finish()).finish.usage.completion_tokens == 64
    assert second.answer.started.queue_s > 0.0


async def test_the_hint_travels_as_retry_info_and_as_pushback(target: RunningTarget) -> None:
    first, second = await one_behind_the_other(target, LONG)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async for _ in target.stub.Generate(iter(messages(LONG, full()))):
            pass
    first.call.cancel(), second.call.cancel()
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailers = dict(failed.value.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert int(trailers["grpc-retry-pushback-ms"]) > 0
    await until(target.idle)


async def test_leaving_the_queue_leaves_it_at_once(target: RunningTarget) -> None:
    first, second = await one_behind_the_other(target, LONG)
    watch = own_time(target)
    second.call.cancel()

    async def nobody_waits() -> bool:
        return (await target.load()).queued == 0

    await until(nobody_waits)
    assert watch.seconds() < FREED_S
    first.call.cancel()
    await until(target.idle)


async def test_a_deadline_in_the_queue_ends_the_wait(target: RunningTarget) -> None:
    first = Call(target)
    await first.reach("started")
    with pytest.raises(DeadlineExceeded):
        await Call(target, TEXT.encode(), timeout=0.2).finish()
    first.call.cancel()
    await until(target.idle)


async def test_a_killed_engine_fails_its_request_and_the_next_one_works(
    target: RunningTarget,
) -> None:
    before = (await target.load()).engine_restarts
    call = Call(target)
    await call.reach("progress", prefilled=2_048)
    os.kill(target.target.engine.pid, signal.SIGKILL)
    with pytest.raises(Unavailable) as failed:
        await call.finish()
    assert failed.value.reason == "ENGINE_RESTARTED" and failed.value.retry_after_s is not None
    assert (await ask(target, TEXT)).finish is not None
    assert (await target.load()).engine_restarts == before + 1


async def test_a_request_in_the_queue_outlives_the_engine(target: RunningTarget) -> None:
    first, second = await one_behind_the_other(target, TEXT.encode())
    os.kill(target.target.engine.pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await first.finish()
    assert (await second.finish()).finish.usage.completion_tokens == 64


async def test_health_follows_the_engine(target: RunningTarget) -> None:
    stub = health_pb2_grpc.HealthStub(target.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))
    statuses = health_pb2.HealthCheckResponse
    serving, away = statuses.SERVING, statuses.NOT_SERVING
    async with asyncio.timeout(30):
        assert (await watch.read()).status == serving
        os.kill(target.target.engine.pid, signal.SIGKILL)
        assert (await watch.read()).status == away
        alive = await stub.Check(health_pb2.HealthCheckRequest(service="liveness"))
        assert alive.status == serving
        assert (await watch.read()).status == serving
    watch.cancel()


async def test_prompts_past_the_number_held_are_refused_before_they_are_read() -> None:
    async with running_target(streams_limit=1) as target:
        holder = target.stub.Generate()
        await holder.write(messages(b"x", full())[0])

        async def held() -> bool:
            return target.target._streams == 1

        await until(held)
        with pytest.raises(Busy) as refused:
            await ask(target, TEXT)
        assert refused.value.metadata["allowed"] == "at most 1"
        holder.cancel()

        async def released() -> bool:
            return target.target._streams == 0

        await until(released)
        assert (await ask(target, TEXT)).finish is not None


async def test_while_the_model_loads_callers_are_told_to_come_back() -> None:
    async with running_target(wait_ready=False) as target:
        with pytest.raises(Unavailable) as refused:
            await ask(target, TEXT)
        assert refused.value.reason == "MODEL_LOADING" and refused.value.retry_after_s == 1.0
        stub = health_pb2_grpc.HealthStub(target.channel)
        found = await stub.Check(health_pb2.HealthCheckRequest(service=""))
        assert found.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await target.load()).slots == 1


async def test_a_drain_refuses_new_calls_and_lets_the_running_one_finish() -> None:
    async with running_target() as target:
        call = Call(target, TEXT.encode())
        await call.reach("started")
        draining = asyncio.create_task(target.server.drain(30.0))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refused:
            await send(target, messages(b"x", full()))
        assert refused.value.reason == "DRAINING"
        answer = await call.finish()
        assert answer.finish.reason == pb.FINISH_REASON_LENGTH
        assert await draining == 0
