"""One request's hold on the target: its place in a lane, its context, its sequence.

The pipeline takes a seat before the engine sees the request and leaves it however the request
ended. Leaving keeps the books true by its order: the engine frees the sequence, then the full
context, the landlord gets its bytes back, and only then does the next request get the place.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from skim.errors import SkimError
from target_svc.admission import Ticket
from target_svc.messages import Done, KvType, Progress, Ready, Reserved, Submit, Tokens
from target_svc.request import Queued


class EventStream(Protocol):
    """The engine's events for one request; raises a SkimError when it failed."""

    def __aiter__(self) -> AsyncIterator[Progress | Tokens | Done]: ...

    async def __anext__(self) -> Progress | Tokens | Done: ...

    def cancel(self) -> None:
        """Tell the engine to stop; the stream then ends or raises."""
        ...


class Engine(Protocol):
    """What a request needs of `engine_client.EngineClient`, which says what each call raises."""

    async def ready(self) -> Ready: ...

    async def submit(self, submit: Submit) -> EventStream: ...

    async def reserve(self, cells: int, kv_type: KvType) -> Reserved: ...

    async def release(self) -> None: ...


class Room(Protocol):
    """GPU memory that was made free for a full context, as `memory.landlord` gives it."""

    @property
    def park_s(self) -> float: ...


class Seat:
    """A place in a lane, and what was built on it."""

    def __init__(self, engine: Engine, ticket: Ticket) -> None:
        self._engine = engine
        self._ticket = ticket
        self._stream: EventStream | None = None
        self._reserved = False
        self._rooms = contextlib.AsyncExitStack()
        self.park_s = 0.0  # parking drafters for this request

    async def turns(self) -> AsyncIterator[Queued]:
        """Yield the place in the queue as it changes, until the request is seated.

        Raises:
            DeadlineExceeded: the deadline passed first.
        """
        total = 0
        async for ahead in self._ticket.turns():
            total = max(total, ahead + 1)  # the one that runs is ahead too
            yield Queued(total - ahead - 1, total)

    async def take_room(self, room: AbstractAsyncContextManager[Room]) -> None:
        """Have memory made free for the full context, and keep it so until the seat is left."""
        self.park_s = (await self._rooms.enter_async_context(room)).park_s

    async def reserve(self, cells: int, kv_type: KvType) -> None:
        """Create the full context."""
        self._reserved = True  # also when we are cancelled on the way: `leave` then cleans up
        await self._engine.reserve(cells, kv_type)

    async def submit(self, submit: Submit) -> EventStream:
        """Hand the request to the engine."""
        self._stream = await self._engine.submit(submit)
        return self._stream

    async def leave(self) -> None:
        """Stop what runs, wait until it has stopped, and give everything back."""
        try:
            if self._stream is not None:
                self._stream.cancel()
                with contextlib.suppress(SkimError):
                    async for _ in self._stream:
                        pass
            if self._reserved:
                await self._engine.release()
        finally:
            try:
                await self._rooms.aclose()
            finally:
                self._ticket.leave()
