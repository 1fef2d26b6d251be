"""Events on their way to one caller: in order, and bounded.

Between `session`, which makes them, and `service`, which streams them. A caller that reads slowly
holds the answer back, and with it the target; it misses progress, never a token.
"""

from __future__ import annotations

import asyncio

from skim.v1 import common_pb2 as pb
from skim.v1.gateway_pb2 import GenerateResponse

# About a second of a fast target's tokens.
OUTBOX_EVENTS = 128


class Outbox:
    """A bounded queue of events with an end."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[GenerateResponse | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(OUTBOX_EVENTS)

    async def send(self, event: GenerateResponse) -> None:
        """Hand an event over; waits while the caller is slow."""
        await self._room.acquire()
        self._events.put_nowait(event)

    async def offer(self, progress: pb.Progress) -> None:
        """Hand progress over, unless the caller is slow."""
        if not self._room.locked():
            await self.send(GenerateResponse(progress=progress))

    def close(self) -> None:
        """Nothing more will be sent."""
        self._events.put_nowait(None)

    async def get(self) -> GenerateResponse | None:
        """Take the next event; None: that was the last."""
        event = await self._events.get()
        if event is not None:
            self._room.release()
        return event
