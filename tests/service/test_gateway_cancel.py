"""Who goes away frees the work: both services' calls end within a second, wherever they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
import structlog

from skim.client import AsyncClient
from skim.errors import DeadlineExceeded, Unavailable
from skim.v1 import common_pb2 as pb
from skim.v1 import gateway_pb2_grpc
from skim.v1.gateway_pb2 import GenerateConfig, GenerateRequest
from tests.fixtures.own_time import OwnTime
from tests.fixtures.scripted_services import LONG, WAIT_S, House, house

FREED_WITHIN_S = 1.0


async def check_freed(built: House, watch: OwnTime, *, drafter: bool = True) -> None:
    """Both calls are cancelled and the gateway holds nothing any more, within a second."""
    calls = [await built.target.opened(), *([await built.drafter.opened()] if drafter else [])]
    admission = built.gateway.servicer.admission
    async with asyncio.timeout(WAIT_S):
        for call in calls:
            await call.ended.wait()
        # Which of the three is free first is nobody's promise.
        while admission.requests or admission.bytes:
            await asyncio.sleep(0)
    assert watch.seconds() < FREED_WITHIN_S
    assert all(call.cancelled for call in calls)


async def until(event: asyncio.Event) -> None:
    async with asyncio.timeout(WAIT_S):
        await event.wait()


async def test_cancelling_while_the_drafter_scores_frees_both() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.may_answer.clear()
        stream = await client.generate(LONG, stream=True)
        await until((await built.drafter.opened()).uploaded)
        stream.cancel()
        await check_freed(built, OwnTime())


async def test_cancelling_while_the_drafter_queues_frees_both() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.queues = True
        built.drafter.may_run.clear()
        stream = await client.generate(LONG, stream=True)
        await until((await built.drafter.opened()).uploaded)
        stream.cancel()
        await check_freed(built, OwnTime())


async def test_cancelling_while_the_target_prefills_frees_it() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.may_answer.clear()
        stream = await client.generate(LONG, stream=True)
        await until((await built.target.opened()).planned)
        stream.cancel()
        await check_freed(built, OwnTime(), drafter=False)


async def test_a_caller_that_reads_nothing_and_cancels_frees_the_target() -> None:
    async with house() as built, grpc.aio.insecure_channel(built.address) as channel:
        # More than every window and queue between the two holds, so that all of them are full.
        built.target.answer = ["x" * 100_000] * 2_000
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate()
        await call.write(GenerateRequest(config=GenerateConfig()))
        await call.write(GenerateRequest(prompt=pb.PromptPart(data=b"short")))
        await call.write(GenerateRequest(end=pb.PromptEnd(total_bytes=5)))
        target = await built.target.opened()
        async with asyncio.timeout(WAIT_S):
            sent = -1
            while sent != target.sent:  # until the target cannot go on
                sent = target.sent
                for _ in range(500):
                    await asyncio.sleep(0)
        assert target.sent < 2_000
        call.cancel()
        await check_freed(built, OwnTime(), drafter=False)


async def test_leaving_the_stream_frees_both() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.may_answer.clear()
        async with await client.generate(LONG, stream=True):
            await until((await built.drafter.opened()).uploaded)
        await check_freed(built, OwnTime())


@contextlib.asynccontextmanager
async def cable(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A wire to `address` that can be cut: where to connect, and what cuts it."""
    ends: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        ends.extend((writer, far_writer))
        await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))

    def cut() -> None:
        for writer in ends:
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", cut
    finally:
        cut()
        server.close()


async def test_a_client_that_vanishes_frees_both() -> None:
    async with house() as built, cable(built.address) as (address, cut):
        built.drafter.may_answer.clear()
        async with AsyncClient(address) as client:
            stream = await client.generate(LONG, stream=True)
            await until((await built.drafter.opened()).uploaded)
            cut()
            await check_freed(built, OwnTime())
            with pytest.raises(Unavailable):
                await stream.answer()


async def test_cancelling_in_the_middle_of_the_upload_frees_both() -> None:
    async with house() as built, grpc.aio.insecure_channel(built.address) as channel:
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate()
        await call.write(GenerateRequest(config=GenerateConfig()))
        await call.write(GenerateRequest(prompt=pb.PromptPart(data=b"x" * 100_000)))
        for service in (built.target, built.drafter):
            await service.opened()
        call.cancel()
        await check_freed(built, OwnTime())


async def test_cancelling_in_the_middle_of_the_upload_is_logged_as_that() -> None:
    with structlog.testing.capture_logs() as lines:
        async with house() as built, grpc.aio.insecure_channel(built.address) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            for _ in range(10):
                call = stub.Generate()
                await call.write(GenerateRequest(config=GenerateConfig()))
                await call.write(GenerateRequest(prompt=pb.PromptPart(data=b"x" * 100_000)))
                await built.target.opened(len(built.target.calls) + 1)
                call.cancel()
                async with asyncio.timeout(WAIT_S):
                    while built.gateway.servicer.admission.requests:
                        await asyncio.sleep(0)
    outcomes = [line["outcome"] for line in lines if line["event"] == "request_finished"]
    assert outcomes == ["cancelled"] * 10


async def test_a_bad_part_frees_both() -> None:
    async with house() as built, grpc.aio.insecure_channel(built.address) as channel:
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate()
        await call.write(GenerateRequest(config=GenerateConfig()))
        await call.write(GenerateRequest(prompt=pb.PromptPart(data=b"x" * 100_000)))
        for service in (built.target, built.drafter):
            await service.opened()
        await call.write(GenerateRequest(prompt=pb.PromptPart(offset=5, data=b"x")))
        watch = OwnTime()
        with pytest.raises(grpc.aio.AioRpcError):
            [response async for response in call]
        await check_freed(built, watch)


async def test_a_deadline_frees_both_and_says_so() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.may_answer.clear()
        with pytest.raises(DeadlineExceeded):
            await client.generate(LONG, deadline_s=2.0)  # time to reach both, on any machine
        await check_freed(built, OwnTime())


async def test_a_cancelled_score_leaves_the_next_request_alone() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.may_answer.clear()
        stream = await client.generate(LONG, stream=True)
        await until((await built.drafter.opened()).uploaded)
        stream.cancel()
        await check_freed(built, OwnTime())
        built.drafter.may_answer.set()
        assert (await client.generate(LONG)).plan.skimmed
