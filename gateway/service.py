"""GatewayService: calls in, sessions run, events out.

Each Generate runs as a task that is cancelled the moment its call ends, however it ends, so that a
caller who vanishes frees its work. Refuses before the first part is read, and before any answer
(so that a client may retry): a wrong token, too many requests, a config out of range, a target
that is not there.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeAlias

import grpc
import structlog

from gateway.admission import Admission, Ticket
from gateway.config import GatewaySettings
from gateway.edge import ask_from_proto, text_messages
from gateway.outbox import Outbox
from gateway.peers import Peers
from gateway.plan import Mode
from gateway.report import Report
from gateway.session import ReadNext, Session
from skim.errors import (
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
    PromptTooLong,
    SkimError,
    Unauthenticated,
)
from skim.log import get_logger
from skim.v1 import gateway_pb2, gateway_pb2_grpc
from skim.v1.gateway_pb2 import GenerateRequest, GenerateResponse

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

MAX_COUNT_BYTES = 8 << 20
# Both legs give up this much before the caller does, so that it still hears why.
DEADLINE_MARGIN_S, DEADLINE_MARGIN_SHARE = 0.1, 0.05
# From the end of a cancelled call's stream to its cancellation: measured, at most 0.5 ms.
CANCEL_SETTLES_S = 0.05


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """What clients call.

    Args:
        settings: of this gateway.
        peers: the services behind it, watched.
    Raises:
        ConfigError: the token cannot be read.
    """

    def __init__(self, settings: GatewaySettings, peers: Peers) -> None:
        self._settings = settings
        self._peers = peers
        self._token = settings.bearer_token()
        self.admission = Admission(settings.max_requests, settings.max_prompt_bytes_in_flight)

    async def Generate(
        self, requests: AsyncIterator[GenerateRequest], context: Context
    ) -> AsyncIterator[GenerateResponse]:
        """Answer one prompt as it streams in."""
        self._authenticate(context)

        async def read() -> GenerateRequest | None:
            message = await anext(requests, None)
            if message is None:
                # A cancelled call ends its stream a moment before it cancels us: without the wait
                # whoever goes away in the middle of an upload would be told off for a bad one.
                await asyncio.sleep(CANCEL_SETTLES_S)
            return message

        remaining_s = context.time_remaining()
        outbox = Outbox()
        task = _start(self._serve(read, outbox, remaining_s), outbox, context)
        try:
            while (event := await outbox.get()) is not None:
                yield event
            await _result(task)
        finally:
            task.cancel()

    async def GenerateText(
        self, request: gateway_pb2.GenerateTextRequest, context: Context
    ) -> gateway_pb2.GenerateTextResponse:
        """Answer one prompt in one message."""
        self._authenticate(context)
        messages = iter(text_messages(request))

        async def read() -> GenerateRequest | None:
            return next(messages, None)

        outbox = Outbox()
        task = _start(self._serve(read, outbox, context.time_remaining()), outbox, context)
        response = gateway_pb2.GenerateTextResponse()
        text: list[str] = []
        try:
            while (event := await outbox.get()) is not None:
                match event.WhichOneof("event"):
                    case "admitted":
                        response.request_id = event.admitted.request_id
                    case "plan":
                        response.plan.CopyFrom(event.plan)
                    case "tokens":
                        text.append(event.tokens.text)
                    case "finish":
                        response.finish.CopyFrom(event.finish)
            await _result(task)
        finally:
            task.cancel()
        response.text = "".join(text)
        return response

    async def CountTokens(
        self, request: gateway_pb2.CountTokensRequest, context: Context
    ) -> gateway_pb2.CountTokensResponse:
        """Count a text's tokens in the target's tokenizer."""
        self._authenticate(context)
        self._peers.require_target(request.model)
        size = len(request.text.encode())
        if size > MAX_COUNT_BYTES:
            raise InvalidRequest.field_value("text", f"{size} bytes", f"at most {MAX_COUNT_BYTES}")
        timeout_s = legs_timeout_s(context.time_remaining(), self._settings.request_max_s)
        count = await self._peers.target_client.count_tokens(request.text, timeout_s)
        return gateway_pb2.CountTokensResponse(prompt_tokens=count)

    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: Context
    ) -> gateway_pb2.ListModelsResponse:
        """List the target and the drafters."""
        self._authenticate(context)
        return gateway_pb2.ListModelsResponse(
            models=self._peers.models(), skim_min_tokens=self._settings.skim_min_tokens
        )

    async def _serve(self, read: ReadNext, outbox: Outbox, remaining_s: float | None) -> None:
        """Admit one request and run it; one log line whatever happens."""
        report, outcome = Report(), "cancelled"
        with self.admission.enter() as ticket:
            try:
                session = await self._admit(ticket, read, outbox, remaining_s, report)
                await session.run(read)
                outcome = "ok"
            except SkimError as error:
                outcome = error.reason
                raise
            except Exception:
                outcome = EngineFault.default_reason
                raise
            finally:
                get_logger().info(
                    "request_finished",
                    request_id=ticket.request_id,
                    outcome=outcome,
                    upload_bytes=ticket.size_bytes,
                    **report.log_fields(),
                )

    async def _admit(
        self,
        ticket: Ticket,
        read: ReadNext,
        outbox: Outbox,
        remaining_s: float | None,
        report: Report,
    ) -> Session:
        """Read and check the config, reserve what it states, choose who serves it."""
        settings = self._settings
        config = await self._read_config(read)
        report.began_s = time.monotonic()
        ask = ask_from_proto(config)
        await self._peers.target.wait_out_restart()
        target = self._peers.require_target(ask.model)
        ticket.identify(config.request_id)
        structlog.contextvars.bind_contextvars(request_id=ticket.request_id)
        if ask.stated_bytes is not None:
            if ask.stated_bytes > settings.prompt_max_bytes:
                raise PromptTooLong(
                    f"prompt must be at most {settings.prompt_max_bytes} bytes, "
                    f"got {ask.stated_bytes}",
                    field="config.messages",
                    metadata={
                        "limit": str(settings.prompt_max_bytes),
                        "got": str(ask.stated_bytes),
                    },
                )
            ticket.hold(ask.stated_bytes)
        name, no_drafter = self._peers.choose_drafter(ask.drafter)
        if ask.mode is Mode.FULL:
            name = ""
        report.drafter = name
        admitted = gateway_pb2.Admitted(
            request_id=ticket.request_id, model=target.model, drafter=name
        )
        await outbox.send(GenerateResponse(admitted=admitted))
        deadline_s = report.began_s + legs_timeout_s(remaining_s, settings.request_max_s)
        pieces: Sequence[bytes] = (b"", b"")
        if ask.roles:
            left_s = max(0.0, deadline_s - time.monotonic())
            pieces = await self._peers.target_client.render_chat(ask.roles, left_s)
        return Session(
            ask,
            pieces,
            ticket,
            settings,
            target=self._peers.target_client,
            drafter=self._peers.drafter_clients.get(name),
            no_drafter=no_drafter,
            deadline_s=deadline_s,
            outbox=outbox,
            report=report,
        )

    async def _read_config(self, read: ReadNext) -> gateway_pb2.GenerateConfig:
        idle_s = self._settings.idle_timeout_s
        try:
            async with asyncio.timeout(idle_s):
                message = await read()
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing came for {idle_s:g} s while the config was due", reason="UPLOAD_IDLE"
            ) from None
        got = "the end of the stream" if message is None else message.WhichOneof("part")
        if message is None or got != "config":
            raise InvalidRequest.field_value("part", got or "nothing", "config first")
        return message.config

    def _authenticate(self, context: Context) -> None:
        if self._token is None:
            return
        metadata = dict(context.invocation_metadata() or ())
        given = str(metadata.get("authorization", ""))
        if not given:
            raise Unauthenticated(
                "metadata `authorization: Bearer TOKEN` is required", reason="TOKEN_MISSING"
            )
        wanted = f"Bearer {self._token}"
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            raise Unauthenticated("the bearer token is wrong")


def legs_timeout_s(remaining_s: float | None, request_max_s: float) -> float:
    """How long calls to the services may take, given what is left to the caller (None: no end)."""
    if remaining_s is None:
        return request_max_s
    margin_s = min(DEADLINE_MARGIN_S, DEADLINE_MARGIN_SHARE * remaining_s)
    return min(request_max_s, remaining_s - margin_s)


def _start(work: Coroutine[Any, Any, None], outbox: Outbox, context: Context) -> asyncio.Task[None]:
    """Run a session beside its call: cancelled when the call ends, closing the outbox after it."""
    task = asyncio.create_task(work)

    def ended(task: asyncio.Task[None]) -> None:
        outbox.close()
        if not task.cancelled():
            task.exception()  # seen: its caller may be gone, and the log has its line already

    task.add_done_callback(ended)
    # The generator that streams the events may be suspended in a send, and learn of it late.
    context.add_done_callback(lambda _: task.cancel())
    return task


async def _result(task: asyncio.Task[None]) -> None:
    """Raise what ended a finished session."""
    if task.cancelled():
        raise asyncio.CancelledError
    await task
