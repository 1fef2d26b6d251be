"""What every service shares on the wire: statuses, health, drain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from skim import errors
from skim.rpc import RpcServer, connect
from skim.rpc_errors import STATUS_CODES, from_rpc_error
from skim.v1 import gateway_pb2 as pb
from skim.v1 import gateway_pb2_grpc as rpc

FAILURES: list[errors.SkimError] = [
    errors.InvalidRequest.field_value("keep_ratio", 2.0, "in (0, 1]"),
    errors.PromptTooLong("too long", field="prompt", metadata={"limit": "1", "got": "2"}),
    errors.SpansNotCanonical("touching", field="spans[1]"),
    errors.PartOutOfOrder("gap", field="prompt.offset"),
    errors.DigestMismatch("differs"),
    errors.NotFound("no such model"),
    errors.Busy("full", retry_after_s=1.5),
    errors.Busy("never fits", reason="FULL_PREFILL_IMPOSSIBLE"),
    errors.PreconditionFailed("no template", reason="NO_CHAT_TEMPLATE"),
    errors.ModelFileError("cut short"),
    errors.Unavailable("loading", reason="MODEL_LOADING", retry_after_s=0.25),
    errors.DeadlineExceeded("late"),
    errors.Unimplemented("not here"),
    errors.Unauthenticated("who?"),
    errors.EngineFault("ours"),
]


class Service(rpc.GatewayServiceServicer):
    """Raises what it is told to; holds Generate open until released."""

    def __init__(self) -> None:
        self.failure: Exception = errors.EngineFault("unset")
        self.entered, self.release = asyncio.Event(), asyncio.Event()

    async def CountTokens(self, request: Any, context: Any) -> Any:
        raise self.failure

    async def Generate(self, requests: Any, context: Any) -> Any:
        self.entered.set()
        await self.release.wait()
        yield pb.GenerateResponse()


@pytest_asyncio.fixture
async def running() -> AsyncIterator[tuple[RpcServer, Service, grpc.aio.Channel]]:
    server = RpcServer(
        service_names=["skim.v1.GatewayService"],
        admin_service_names=[],
        listen="127.0.0.1:0",
        admin_listen="127.0.0.1:0",
    )
    service = Service()
    rpc.add_GatewayServiceServicer_to_server(service, server.data)
    await server.start()
    channel = connect(f"127.0.0.1:{server.port}")
    yield server, service, channel
    await channel.close()
    await server.stop()


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
async def test_error_arrives_as_it_was_raised(running: Any, failure: errors.SkimError) -> None:
    _, service, channel = running
    service.failure = failure
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.GatewayServiceStub(channel).CountTokens(pb.CountTokensRequest())
    received = from_rpc_error(caught.value)
    assert type(received) is type(failure)
    assert (received.message, received.reason, received.field) == (
        failure.message,
        failure.reason,
        failure.field,
    )
    assert received.metadata == failure.metadata
    assert received.retry_after_s == failure.retry_after_s


async def test_defect_shows_no_details_to_the_caller(running: Any) -> None:
    _, service, channel = running
    service.failure = ZeroDivisionError("secret prompt")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.GatewayServiceStub(channel).CountTokens(pb.CountTokensRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value)


async def test_failed_call_leaves_none_in_flight(running: Any) -> None:
    server, service, channel = running
    service.failure = errors.Busy("full")
    with pytest.raises(grpc.aio.AioRpcError):
        await rpc.GatewayServiceStub(channel).CountTokens(pb.CountTokensRequest())
    assert await server.drain(grace_s=5.0) == 0


def test_every_error_class_has_a_status() -> None:
    missing = [
        cls.__name__
        for cls in vars(errors).values()
        if isinstance(cls, type)
        and issubclass(cls, errors.SkimError)
        and cls not in (errors.SkimError, errors.ConfigError)
        and cls not in [mapped for mapped, _ in STATUS_CODES]
    ]
    assert missing == []


async def test_health_is_not_serving_until_told(running: Any) -> None:
    server, _, channel = running
    health = health_pb2_grpc.HealthStub(channel)

    async def check(name: str) -> Any:
        return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

    serving = health_pb2.HealthCheckResponse
    assert await check("readiness") == serving.NOT_SERVING
    assert await check("liveness") == serving.SERVING
    await server.set_serving(True)
    for name in ("", "readiness", "skim.v1.GatewayService"):
        assert await check(name) == serving.SERVING


async def test_watcher_hears_of_changes_after_another_one_left(running: Any) -> None:
    server, _, channel = running
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="readiness")
    leaving, staying = health.Watch(request), health.Watch(request)
    for watch in (leaving, staying):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    leaving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leaving.read()
    # The server learns of the cancellation on the same connection before it sees this call.
    await health.Check(request)
    await server.set_serving(True)
    change = await asyncio.wait_for(staying.read(), 10)
    assert change.status == health_pb2.HealthCheckResponse.SERVING
    staying.cancel()


async def test_drain_waits_for_running_calls_and_refuses_new_ones(running: Any) -> None:
    server, service, channel = running
    stub = rpc.GatewayServiceStub(channel)
    call = stub.Generate()
    await call.write(pb.GenerateRequest())
    await asyncio.wait_for(service.entered.wait(), 5)
    drain = asyncio.create_task(server.drain(grace_s=20))
    await asyncio.sleep(0)  # let the drain close the gate
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CountTokens(pb.CountTokensRequest())
    assert from_rpc_error(caught.value).reason == "DRAINING"
    assert not drain.done()
    service.release.set()
    assert await asyncio.wait_for(drain, 10) == 0


async def test_port_in_use_is_a_clear_error(running: Any) -> None:
    server, _, _ = running
    second = RpcServer(
        service_names=[],
        admin_service_names=[],
        listen=f"127.0.0.1:{server.port}",
        admin_listen="127.0.0.1:0",
    )
    with pytest.raises(errors.ConfigError, match=str(server.port)):
        await second.start()
