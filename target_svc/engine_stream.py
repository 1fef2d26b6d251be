"""The events of one request, from the engine's client to the coroutine that reads them.

Filled by `engine_client.py` as frames arrive. What a slow reader has not taken is merged: tokens
are joined, progress is replaced, so a stream never holds more than its own max_tokens, and the
engine never waits for it. A failure is raised as its class of skim/errors.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np

import skim.errors
from skim.errors import EngineFault, SkimError
from target_svc.messages import Done, Progress, Tokens

Event = Progress | Tokens | Done


def error_from(error: str, reason: str, message: str) -> SkimError:
    """Rebuild an error that crossed the socket by its class's name; unknown names are ours."""
    kind = getattr(skim.errors, error, EngineFault)
    if not (isinstance(kind, type) and issubclass(kind, SkimError)):
        kind = EngineFault
    return kind(message, reason=reason)


class EngineStream:
    """The events of one request: Progress and Tokens, then one Done; or a SkimError is raised.

    Leaving `async with`, or `aclose`, cancels what still runs. One reader at a time.
    """

    def __init__(self, request_id: str, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._pending: deque[Event] = deque()
        self._error: SkimError | None = None
        self._ended = False
        self._wake = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._pending.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    async def aclose(self) -> None:
        """Cancel the request if it still runs. Safe to call twice."""
        self.cancel()

    def cancel(self) -> None:
        """Tell the engine to stop; the stream then raises Cancelled. No effect once it ended."""
        if not self._ended:
            self._cancel(self.request_id)

    def push(self, event: Event) -> None:
        """Add an event; only the engine's client calls this."""
        last = self._pending[-1] if self._pending else None
        if isinstance(event, Progress) and isinstance(last, Progress):
            self._pending[-1] = event
        elif isinstance(event, Tokens) and isinstance(last, Tokens):
            self._pending[-1] = _join(last, event)
        else:
            self._pending.append(event)
        self._ended = self._ended or isinstance(event, Done)
        self._wake.set()

    def fail(self, error: SkimError) -> None:
        """End the stream with an error; only the engine's client calls this."""
        if not self._ended:
            self._error, self._ended = error, True
            self._wake.set()


def _join(first: Tokens, second: Tokens) -> Tokens:
    return Tokens(
        first.request_id,
        np.concatenate((first.ids, second.ids)),
        np.concatenate((first.logprobs, second.logprobs)),
        np.concatenate((first.top_ids, second.top_ids)),
        np.concatenate((first.top_logprobs, second.top_logprobs)),
        second.draft_tokens,
        second.accepted_tokens,
        second.steps,
    )
