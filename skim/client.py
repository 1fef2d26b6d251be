"""Ask a gateway from Python: `Client` for threads, `AsyncClient` for asyncio.

The user's door to a running system, over the same wire as every other client:

    with Client("127.0.0.1:50051") as client:
        answer = client.ask("Who hid the key?", document)
        for event in client.generate("Once upon a time", stream=True):
            ...

Raises the tree of `skim.errors`, whatever the gateway or the services behind it refused; a gateway
that is not there is `Unavailable`. Time to the first token is measured here, at the socket.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from skim.client_async import AsyncAnswerStream, AsyncClient
from skim.client_types import Answer, Event, Gathered, Message, Models, Options
from skim.client_wire import (
    Question,
    Reader,
    call_metadata,
    check_deadline,
    compose,
    read_models,
)
from skim.rpc import CHANNEL_OPTIONS
from skim.rpc_errors import from_rpc_error
from skim.v1 import gateway_pb2, gateway_pb2_grpc

__all__ = ["AnswerStream", "AsyncAnswerStream", "AsyncClient", "Client", "Message"]


class AnswerStream:
    """The events of one answer, as they arrive. Leaving its `with` block stops the request."""

    def __init__(self, call: Any, reader: Reader) -> None:
        self._call = call
        self._reader = reader

    def __iter__(self) -> Iterator[Event]:
        """Read the events, each once.

        Raises:
            SkimError: the request failed.
        """
        try:
            for response in self._call:
                event = self._reader.event(response, time.monotonic())
                if event is not None:
                    yield event
        except grpc.RpcError as failure:
            raise from_rpc_error(failure) from failure

    def answer(self) -> Answer:
        """Read to the end and gather the answer."""
        gathered = Gathered()
        for event in self:
            gathered.add(event)
        return gathered.answer()

    def cancel(self) -> None:
        """Stop the request; its work is freed."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class Client:
    """A gateway's client for threads; one may be shared between them.

    Args:
        address: `host:port` or `unix:/path` of the gateway.
        token: bearer token, where the gateway asks for one.
        deadline_s: seconds that each call may take, unless it says otherwise; None: no limit.
    """

    def __init__(
        self, address: str, *, token: str | None = None, deadline_s: float | None = None
    ) -> None:
        check_deadline(deadline_s)
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub: Any = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self._deadline_s = deadline_s
        self._metadata = call_metadata(token)
        self._chats: bool | None = None

    @overload
    def generate(
        self,
        prompt: str | bytes | None = None,
        *,
        messages: Sequence[Message | tuple[str, str]] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Answer: ...

    @overload
    def generate(
        self,
        prompt: str | bytes | None = None,
        *,
        messages: Sequence[Message | tuple[str, str]] | None = None,
        stream: Literal[True],
        **options: Unpack[Options],
    ) -> AnswerStream: ...

    def generate(
        self,
        prompt: str | bytes | None = None,
        *,
        messages: Sequence[Message | tuple[str, str]] | None = None,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Answer | AnswerStream:
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
        answers = AnswerStream(call, reader)
        return answers if stream else answers.answer()

    @overload
    def ask(
        self,
        question: str,
        document: str,
        *,
        system: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Answer: ...

    @overload
    def ask(
        self,
        question: str,
        document: str,
        *,
        system: str | None = None,
        stream: Literal[True],
        **options: Unpack[Options],
    ) -> AnswerStream: ...

    def ask(
        self,
        question: str,
        document: str,
        *,
        system: str | None = None,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Answer | AnswerStream:
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
            self._chats = self.models().target.chat
        prompt, messages = compose(question, document, system, chat=self._chats)
        # Written twice, since the type of the result hangs on a literal.
        if stream:
            return self.generate(prompt, messages=messages, stream=True, **options)
        return self.generate(prompt, messages=messages, **options)

    def count_tokens(self, text: str, *, model: str = "") -> int:
        """Count a text's tokens in the target's tokenizer, without template."""
        request = gateway_pb2.CountTokensRequest(model=model, text=text)
        return int(self._ask(self._stub.CountTokens, request).prompt_tokens)

    def models(self) -> Models:
        """List the models behind the gateway, and whether they serve."""
        return read_models(self._ask(self._stub.ListModels, gateway_pb2.ListModelsRequest()))

    def _ask(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._deadline_s, metadata=self._metadata)
        except grpc.RpcError as failure:
            raise from_rpc_error(failure) from failure

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
