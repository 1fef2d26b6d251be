"""The gateway's own life: health that follows its peers, draining, the admin port, its log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.peers import Peer
from skim.client import AsyncClient
from skim.errors import Unavailable
from skim.v1 import admin_pb2, admin_pb2_grpc
from tests.fixtures.scripted_services import LONG, WAIT_S, House, house, start_service

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def until_health(built: House, wanted: int) -> None:
    """Ask for the gateway's readiness until it is as wanted.

    Asks, and does not watch: where one watcher leaves, the library's server forgets the others.
    """
    question = health_pb2.HealthCheckRequest(service="readiness")
    async with asyncio.timeout(WAIT_S), grpc.aio.insecure_channel(built.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while (await stub.Check(question)).status != wanted:
            pass


async def peer_until(built: House, name: str, serving: bool) -> None:
    async with asyncio.timeout(WAIT_S):
        await built.gateway.peers.drafters[name].until(serving)


async def test_the_gateway_is_ready_while_the_target_is() -> None:
    async with house() as built:
        await until_health(built, SERVING)
        await built.target_server.set_serving(False)
        await until_health(built, NOT_SERVING)
        await built.target_server.set_serving(True)
        await until_health(built, SERVING)


async def test_the_gateway_is_alive_whatever_the_target() -> None:
    async with house() as built:
        await built.target_server.stop()
        await until_health(built, NOT_SERVING)
        async with grpc.aio.insecure_channel(built.address) as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="liveness")
            )
    assert reply.status == SERVING


async def test_a_drafter_that_is_down_leaves_the_gateway_ready() -> None:
    async with house(drafter_down=True) as built, AsyncClient(built.address) as client:
        await until_health(built, SERVING)
        (drafter,) = (await client.models()).drafters
    assert not drafter.serving
    assert drafter.detail


async def test_a_drafter_that_dies_and_comes_back_is_noticed_both_times() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        port = built.drafter_server.port
        await built.drafter_server.stop()
        await peer_until(built, "mini", False)
        assert (await client.generate(LONG)).plan.full_reason == "no_drafter"
        again = await start_service(built.drafter, "skim.v1.DrafterService", f"127.0.0.1:{port}")
        try:
            await peer_until(built, "mini", True)
            assert (await client.generate(LONG)).plan.skimmed
        finally:
            await again.stop()


async def test_a_drafter_that_swaps_its_model_is_described_anew() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        await built.drafter_server.set_serving(False)
        await peer_until(built, "mini", False)
        built.drafter.digest = "ef"
        await built.drafter_server.set_serving(True)
        await peer_until(built, "mini", True)
        assert (await client.models()).drafters[0].model_digest == "ef"


class ForgetfulHealth(health_pb2_grpc.HealthServicer):
    """Tells a watcher its first state and never another; asked, it tells the truth."""

    def __init__(self) -> None:
        self.status = SERVING

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield health_pb2.HealthCheckResponse(status=self.status)
        await asyncio.Event().wait()

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=self.status)


async def test_a_change_that_no_watch_tells_is_found_by_asking() -> None:
    health = ForgetfulHealth()
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def describe() -> str:
        return "described"

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        peer = Peer("it", channel, describe, interval_s=0.05)
        watching = asyncio.create_task(peer.watch())
        try:
            async with asyncio.timeout(WAIT_S):
                await peer.until(True)
                health.status = NOT_SERVING
                await peer.until(False)
        finally:
            watching.cancel()
            await server.stop(None)
    assert peer.problem == "it is not ready"


async def admin(built: House, name: str, request: Any) -> Any:
    async with grpc.aio.insecure_channel(built.admin_address) as channel:
        return await getattr(admin_pb2_grpc.AdminServiceStub(channel), name)(request)


async def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.may_answer.clear()
        stream = await client.generate(LONG, stream=True)
        async with asyncio.timeout(WAIT_S):
            await (await built.target.opened()).planned.wait()
        draining = asyncio.create_task(admin(built, "Drain", admin_pb2.DrainRequest(grace_s=60)))
        await until_health(built, NOT_SERVING)
        with pytest.raises(Unavailable) as refused:
            await client.generate(LONG)
        assert refused.value.reason == "DRAINING"
        built.target.may_answer.set()
        assert (await stream.answer()).text == "The key."
        async with asyncio.timeout(WAIT_S):
            assert (await draining).unfinished == 0


async def test_draining_says_what_did_not_finish() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.may_answer.clear()
        stream = await client.generate(LONG, stream=True)
        await built.target.opened()
        assert (await admin(built, "Drain", admin_pb2.DrainRequest(grace_s=0.0))).unfinished == 1
        stream.cancel()


async def test_the_configuration_is_told_without_the_token() -> None:
    async with house(token="s3cret") as built:
        reply = await admin(built, "GetConfig", admin_pb2.GetConfigRequest())
    assert reply.settings["skim_min_tokens"] == "100"
    assert "s3cret" not in str(reply)


@pytest.mark.parametrize(
    ("name", "request_", "code"),
    [
        ("LoadDrafter", admin_pb2.LoadDrafterRequest(name="x"), grpc.StatusCode.UNIMPLEMENTED),
        ("SwapDrafter", admin_pb2.SwapDrafterRequest(name="x"), grpc.StatusCode.UNIMPLEMENTED),
        ("Drain", admin_pb2.DrainRequest(grace_s=-1), grpc.StatusCode.INVALID_ARGUMENT),
        ("Drain", admin_pb2.DrainRequest(grace_s=float("nan")), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_the_admin_port_refuses(name: str, request_: Any, code: grpc.StatusCode) -> None:
    async with house() as built:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await admin(built, name, request_)
    assert failed.value.code() is code


@pytest.mark.parametrize("fails", [False, True])
async def test_each_request_is_one_line_of_the_log_without_its_text(fails: bool) -> None:
    with structlog.testing.capture_logs() as lines:
        async with house() as built, AsyncClient(built.address) as client:
            if fails:
                built.target.refuses["tokens"] = Unavailable("gone", reason="ENGINE_RESTARTED")
                with pytest.raises(Unavailable):
                    await client.generate(LONG, request_id="mine")
            else:
                await client.generate(LONG, request_id="mine")
    finished = [line for line in lines if line["event"] == "request_finished"]
    assert len(finished) == 1
    assert finished[0]["request_id"] == "mine"
    assert finished[0]["outcome"] == ("ENGINE_RESTARTED" if fails else "ok")
    assert finished[0]["plan"] == "skim"
    if not fails:
        assert finished[0]["kept_tokens"] == 10
        assert finished[0]["ttft_s"] > 0
    assert "needle" not in json.dumps(lines, default=str)
    assert "key" not in json.dumps(finished, default=str)


async def test_a_request_waits_for_a_target_that_comes_back_in_a_moment() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        await built.target_server.set_serving(False)
        async with asyncio.timeout(WAIT_S):
            await built.gateway.peers.target.until(False)
        asking = asyncio.create_task(client.generate(LONG))
        await admitted(built, 1)
        await built.target_server.set_serving(True)
        assert (await asking).text == "The key."


async def test_a_request_does_not_wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.peers.RESTART_S", 0.05)
    async with house() as built, AsyncClient(built.address) as client:
        await built.target_server.set_serving(False)
        async with asyncio.timeout(WAIT_S):
            await built.gateway.peers.target.until(False)
        with pytest.raises(Unavailable) as refused:
            await client.generate(LONG)
    assert refused.value.reason == "TARGET_UNAVAILABLE"
    assert refused.value.retry_after_s


async def admitted(built: House, count: int) -> None:
    """Wait until the gateway holds that many requests."""
    async with asyncio.timeout(WAIT_S):
        while built.gateway.servicer.admission.requests < count:
            await asyncio.sleep(0)
