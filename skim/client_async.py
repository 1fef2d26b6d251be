"""`AsyncClient`: the client for asyncio. See `skim.client`, from where it is imported.

One event loop, no threads; otherwise the same calls, options, events and errors as `Client`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from skim.client_types import Answer, Event, Gathered, Message, Models, Options
from skim.client_wire import (
    Question,
    Reader,
    call_metadata,
    check_deadline,
    compose,
    read_models,
)
from skim.errors import Cancelled
from skim.rpc import connect
from skim.rpc_errors import from_rpc_error
from skim.v1 import gateway_pb2, gateway_pb2_grpc


class AsyncAnswerStream:
    """The events of one answer, as they arrive. Leaving its `with` block stops the request."""

    def __init__(self, call: Any, reader: Reader) -> None:
        self._call = call
        self._reader = reader

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Read the events, each once.

        Raises:
            SkimError: the request failed.
        """
        try:
            async for response in self._call:
                event = self._reader.event(response, time.monotonic())
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from failure
        except asyncio.CancelledError:
            # A call that ended as CANCELLED looks like a cancellation of the task that reads it.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Cancelled("the request was cancelled") from None

    async def answer(self) -> Answer:
        """Read to the end and gather the answer."""
        gathered = Gathered()
        async for event in self:
            gathered.add(event)
        return gathered.answer()

    def cancel(self) -> None:
        """Stop the request; its work is freed."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class AsyncClient:
    """A gateway's client for asyncio. Belongs to the loop it is made in.

    Args:
        address: `host:port` or `unix:/path` of the gateway.
        token: bearer token, where the gateway asks for one.
        deadline_s: seconds that each call may take, unless it says otherwise; None: no limit.
    """

    def __init__(
        self, address: str, *, token: str | None = None, deadline_s: float | None = None
    ) -> None:
        check_deadline(deadline_s)
        self._channel = connect(address)
        self._stub: Any = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self._deadline_s = deadline_s
        self._metadata = call_metadata(token)
        self._chats: bool | None = None

    @overload
    async def generate(
        self,
        prompt: str | bytes | None = None,
        *,
        messages: Sequence[Message | tuple[str, str]] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Answer: ...

    @overload
    async def generate(
        self,
        prompt: str | bytes | None = None,
        *,
        messages: Sequence[Message | tuple[str, str]] | None = None,
        stream: Literal[True],
        **options: Unpack[Options],
    ) -> AsyncAnswerStream: ...

    async def generate(
        self,
        prompt: str | bytes | None = None,
        *,
        messages: Sequence[Message | tuple[str, str]] | None = None,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Answer | AsyncAnswerStream:
        """Answer a raw prompt, or chat messages.

        Args:
            prompt: raw text; exactly one of `prompt` and `messages` is given.
            messages: chat messages, rendered by the model's own template.
            stream: return the events as they arrive instead of the whole answer.
            options: see `skim.client_types.Options`.
        Raises:
            SkimError: the request was refused, or failed.
        """
        question = Question(prompt, messages, options)
        reader = Reader(question.upload, time.monotonic())
        call = self._stub.Generate(
            question.requests(),
            timeout=options.get("deadline_s", self._deadline_s),
            metadata=self._metadata,
        )
        answers = AsyncAnswerStream(call, reader)
        return answers if stream else await answers.answer()

    @overload
    async def ask(
        self,
        question: str,
        document: str,
        *,
        system: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Answer: ...

    @overload
    async def ask(
        self,
        question: str,
        document: str,
        *,
        system: str | None = None,
        stream: Literal[True],
        **options: Unpack[Options],
    ) -> AsyncAnswerStream: ...

    async def ask(
        self,
        question: str,
        document: str,
        *,
        system: str | None = None,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Answer | AsyncAnswerStream:
        """Answer a question over a document: as chat where the model has a template, else raw.

        Args:
            question: stands below the document.
            document: the text to be skimmed. Kept spans count from its first byte, or from the
                first byte of `system` where that is given.
            system: instructions, never dropped.
            stream: return the events as they arrive instead of the whole answer.
            options: see `skim.client_types.Options`.
        Raises:
            SkimError: the request was refused, or failed.
        """
        if self._chats is None:
            self._chats = (await self.models()).target.chat
        prompt, messages = compose(question, document, system, chat=self._chats)
        # Written twice, since the type of the result hangs on a literal.
        if stream:
            return await self.generate(prompt, messages=messages, stream=True, **options)
        return await self.generate(prompt, messages=messages, **options)

    async def count_tokens(self, text: str, *, model: str = "") -> int:
        """Count a text's tokens in the target's tokenizer, without template."""
        request = gateway_pb2.CountTokensRequest(model=model, text=text)
        return int((await self._ask(self._stub.CountTokens, request)).prompt_tokens)

    async def models(self) -> Models:
        """List the models behind the gateway, and whether they serve."""
        return read_models(await self._ask(self._stub.ListModels, gateway_pb2.ListModelsRequest()))

    async def _ask(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._deadline_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from failure

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
