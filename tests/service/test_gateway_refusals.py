"""What is refused, with which error, and that the gateway goes on: input, target, limits, token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from skim.client import AsyncClient, Message
from skim.errors import (
    Busy,
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
    PreconditionFailed,
    PromptTooLong,
    SkimError,
    Unauthenticated,
    Unavailable,
)
from skim.rpc_errors import from_rpc_error
from skim.v1 import common_pb2 as pb
from skim.v1 import gateway_pb2, gateway_pb2_grpc
from skim.v1.gateway_pb2 import GenerateConfig, GenerateRequest
from tests.fixtures.scripted_services import LONG, WAIT_S, House, house


def config(**fields: Any) -> GenerateRequest:
    return GenerateRequest(config=GenerateConfig(**fields))


def part(offset: int, data: bytes, message: int | None = None) -> GenerateRequest:
    made = GenerateRequest(prompt=pb.PromptPart(offset=offset, data=data))
    if message is not None:
        made.prompt.message = message
    return made


def end(total_bytes: int, sha256: bytes = b"") -> GenerateRequest:
    return GenerateRequest(end=pb.PromptEnd(total_bytes=total_bytes, sha256=sha256))


async def failure_of(built: House, messages: Sequence[GenerateRequest]) -> grpc.aio.AioRpcError:
    """Send messages and return how the call failed."""

    async def requests() -> AsyncIterator[GenerateRequest]:
        for message in messages:
            yield message

    async with grpc.aio.insecure_channel(built.address) as channel:
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(requests())
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async with asyncio.timeout(WAIT_S):
                [response async for response in call]
    return failed.value


USER = gateway_pb2.Message(role=gateway_pb2.ROLE_USER)
CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("messages", "code", "field"),
    [
        ([part(0, b"a")], CODE.INVALID_ARGUMENT, "part"),
        ([], CODE.INVALID_ARGUMENT, "part"),
        ([GenerateRequest()], CODE.INVALID_ARGUMENT, "part"),
        ([config(), config()], CODE.INVALID_ARGUMENT, "part"),
        ([config(), part(0, b"a")], CODE.INVALID_ARGUMENT, "part"),  # no end
        ([config(), end(0)], CODE.INVALID_ARGUMENT, "prompt"),  # empty
        ([config(), part(1, b"a")], CODE.OUT_OF_RANGE, "prompt.offset"),
        ([config(), part(0, b"ab"), part(1, b"b")], CODE.OUT_OF_RANGE, "prompt.offset"),
        ([config(), part(0, b"ab"), end(3)], CODE.OUT_OF_RANGE, "end.total_bytes"),
        ([config(), part(0, b"ab"), end(2, b"\0" * 32)], CODE.DATA_LOSS, "end.sha256"),
        ([config(), part(0, b"a\xffb"), end(3)], CODE.INVALID_ARGUMENT, "prompt"),
        ([config(), part(0, b"x" * 2_001)], CODE.INVALID_ARGUMENT, "prompt"),
        (
            [config(messages=[gateway_pb2.Message(role=1, size_bytes=2_001)])],
            CODE.INVALID_ARGUMENT,
            "config.messages",
        ),
        ([config(messages=[USER]), part(0, b"a")], CODE.INVALID_ARGUMENT, "prompt.message"),
        (
            [config(selection=pb.SelectionConfig(keep_ratio=2.0))],
            CODE.INVALID_ARGUMENT,
            "config.selection.keep_ratio",
        ),
        (
            [config(sampling=pb.SamplingConfig(temperature=float("nan")))],
            CODE.INVALID_ARGUMENT,
            "config.sampling.temperature",
        ),
        (
            [config(protected=[pb.ByteRange(begin=0, end=3)]), part(0, b"ab"), end(2)],
            CODE.INVALID_ARGUMENT,
            "config.protected[0]",
        ),
        ([config(model="other")], CODE.NOT_FOUND, "config.model"),
        ([config(drafter="other")], CODE.NOT_FOUND, "config.drafter"),
        ([config(request_id="a b")], CODE.INVALID_ARGUMENT, "config.request_id"),
    ],
)
async def test_bad_input_is_refused_by_name_and_the_gateway_goes_on(
    messages: list[GenerateRequest], code: grpc.StatusCode, field: str
) -> None:
    async with house(prompt_max_bytes=2_000) as built, AsyncClient(built.address) as client:
        failure = await failure_of(built, messages)
        assert failure.code() is code
        error = from_rpc_error(failure)
        assert error.field == field
        assert error.metadata
        assert (await client.generate(LONG)).text == "The key."
        assert built.gateway.servicer.admission.bytes == 0


async def test_a_caller_that_sends_nothing_is_given_up() -> None:
    async with house(idle_timeout_s=0.1) as built:
        async with grpc.aio.insecure_channel(built.address) as channel:
            call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate()
            await call.write(config())
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                async with asyncio.timeout(WAIT_S):
                    [response async for response in call]
    error = from_rpc_error(failed.value)
    assert (type(error), error.reason) == (DeadlineExceeded, "UPLOAD_IDLE")


# The target's own refusals.


@pytest.mark.parametrize("stage", ["config", "end", "plan", "tokens"])
@pytest.mark.parametrize(
    "error",
    [
        Busy("the queue is full", retry_after_s=1.5),
        Busy("no memory", reason="FULL_PREFILL_IMPOSSIBLE", metadata={"limit": "1", "got": "2"}),
        PreconditionFailed("plain rope", reason="POSITIONS_NOT_SUPPORTED"),
        Unavailable("the engine was restarted", reason="ENGINE_RESTARTED", retry_after_s=1.0),
        PromptTooLong("at most 100 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.reason,
)
async def test_what_the_target_refuses_reaches_the_caller_unchanged(
    stage: str, error: SkimError
) -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.refuses_once[stage] = error
        with pytest.raises(type(error)) as refused:
            await client.generate(LONG)
        assert refused.value.reason == error.reason
        assert refused.value.message == error.message
        assert refused.value.retry_after_s == error.retry_after_s
        assert refused.value.metadata == error.metadata
        assert (await client.generate(LONG)).text == "The key."


async def test_a_target_that_dies_is_unavailable_without_its_address() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.may_answer.clear()
        stream = await client.generate(LONG, stream=True)
        async with asyncio.timeout(WAIT_S):
            await (await built.target.opened()).planned.wait()
        await built.target_server.stop()
        with pytest.raises(Unavailable) as refused:
            await stream.answer()
    assert refused.value.reason == "TARGET_UNAVAILABLE"
    assert "127.0.0.1" not in refused.value.message
    assert refused.value.retry_after_s


async def test_a_target_that_is_not_there_is_refused_before_the_upload() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        await built.target_server.stop()
        async with asyncio.timeout(WAIT_S):
            await built.gateway.peers.target.until(False)
        with pytest.raises(Unavailable) as refused:
            await client.generate(LONG)
        assert refused.value.reason == "TARGET_UNAVAILABLE"
        with pytest.raises(Unavailable):
            await client.count_tokens("x")
        models = await client.models()
    assert not models.target.serving
    assert "target" in models.target.detail


@pytest.mark.parametrize(
    "error",
    [
        PreconditionFailed("it drops messages", reason="TEMPLATE_NOT_STREAMABLE"),
        PreconditionFailed("no template", reason="NO_CHAT_TEMPLATE"),
    ],
)
async def test_a_template_that_cannot_be_streamed_is_a_failed_precondition(
    error: SkimError,
) -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.chat_error = error
        with pytest.raises(PreconditionFailed) as refused:
            await client.generate(messages=[Message("user", "hi")])
    assert refused.value.reason == error.reason


async def test_a_target_that_cuts_the_template_wrongly_is_our_fault() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.pieces = lambda roles: ["only one"]
        with pytest.raises(EngineFault):
            await client.generate(messages=[Message("user", "hi")])


# Admission.


async def test_one_request_too_many_is_refused_before_any_answer_with_a_hint() -> None:
    async with house(max_requests=1) as built, AsyncClient(built.address) as client:
        built.target.may_answer.clear()
        first = await client.generate(LONG, stream=True)
        await built.target.opened()
        failure = await failure_of(built, [config(), part(0, LONG), end(len(LONG))])
        assert failure.code() is CODE.RESOURCE_EXHAUSTED
        error = from_rpc_error(failure)
        assert (error.reason, error.retry_after_s) == ("QUEUE_FULL", 1.0)
        pushback = dict(failure.trailing_metadata())["grpc-retry-pushback-ms"]
        assert pushback == "1000"
        # No headers came before the refusal, so that a client's retry policy may act on it.
        assert not failure.initial_metadata()
        built.target.may_answer.set()
        await first.answer()
        assert (await client.generate(LONG)).text == "The key."


async def test_prompt_bytes_over_the_budget_are_refused_as_they_come() -> None:
    async with (
        house(max_prompt_bytes_in_flight=len(LONG) + 10) as built,
        AsyncClient(built.address) as client,
    ):
        built.target.may_answer.clear()
        first = await client.generate(LONG, stream=True)
        async with asyncio.timeout(WAIT_S):
            await (await built.target.opened()).planned.wait()
        with pytest.raises(Busy) as refused:
            await client.generate(b"x" * 11)
        assert refused.value.reason == "PROMPT_BYTES_LIMIT"
        assert refused.value.retry_after_s
        built.target.may_answer.set()
        await first.answer()
        assert (await client.generate(b"x" * 11)).text == "The key."


async def test_stated_bytes_over_the_budget_are_refused_before_the_first_part() -> None:
    async with house(max_prompt_bytes_in_flight=10) as built:
        sized = gateway_pb2.Message(role=gateway_pb2.ROLE_USER, size_bytes=11)
        failure = await failure_of(built, [config(messages=[sized])])
    assert from_rpc_error(failure).reason == "PROMPT_BYTES_LIMIT"
    assert not built.target.calls


async def test_an_id_in_flight_is_refused() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.may_answer.clear()
        first = await client.generate(LONG, stream=True, request_id="same")
        await built.target.opened()
        with pytest.raises(InvalidRequest) as refused:
            await client.generate(LONG, request_id="same")
        assert refused.value.reason == "REQUEST_ID_IN_USE"
        built.target.may_answer.set()
        await first.answer()
        assert (await client.generate(LONG, request_id="same")).text == "The key."


# The token.


async def test_without_the_token_every_call_is_refused() -> None:
    async with house(token="s3cret") as built, AsyncClient(built.address) as client:
        for call in (client.generate("x"), client.count_tokens("x"), client.models()):
            with pytest.raises(Unauthenticated) as refused:
                await call
            assert refused.value.reason == "TOKEN_MISSING"
    assert not built.target.calls


@pytest.mark.parametrize("token", ["s3creT", "s3cretx", "s3cre", "s"])
async def test_a_wrong_token_is_refused(token: str) -> None:
    async with house(token="s3cret") as built:
        async with grpc.aio.insecure_channel(built.address) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            request = gateway_pb2.ListModelsRequest()
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await stub.ListModels(request, metadata=[("authorization", f"Bearer {token}")])
    assert from_rpc_error(failed.value).reason == "TOKEN_INVALID"


async def test_the_token_opens_every_call() -> None:
    async with house(token="s3cret") as built, AsyncClient(built.address, token="s3cret") as client:
        assert (await client.generate(LONG)).text == "The key."
        assert (await client.models()).target.serving
