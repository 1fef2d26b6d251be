"""Read the messages of one Generate stream in the order the protocol asks for.

Used by `service.py` alone. Refuses a message out of turn, an end before its time, silence, and
anything after the plan, each by saying what was due and what came.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Literal

from skim.errors import DeadlineExceeded, InvalidRequest
from skim.v1 import target_pb2

Request = target_pb2.TargetServiceGenerateRequest
Part = Literal["config", "prompt", "end", "plan"]


class Inbox:
    """One caller's messages.

    Args:
        requests: the messages as they arrive.
        idle_timeout_s: how long the caller may take for the next one.
    """

    def __init__(self, requests: AsyncIterator[Request], idle_timeout_s: float) -> None:
        self._requests = requests
        self._idle_timeout_s = idle_timeout_s
        self._late: asyncio.Task[Request | None] | None = None

    async def take(self, *due: Part) -> Request:
        """Read the next message.

        Args:
            due: the parts it may be.
        Raises:
            InvalidRequest: another part came, or the stream ended.
            DeadlineExceeded: nothing came for `idle_timeout_s`.
        """
        allowed = " or ".join(due)
        try:
            message = await asyncio.wait_for(self._next(), self._idle_timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing came for {self._idle_timeout_s:g} s while {allowed} was due"
            ) from None
        got = "the end of the stream" if message is None else message.WhichOneof("part")
        if message is None or got not in due:
            raise InvalidRequest.field_value("part", got or "nothing", allowed)
        return message

    def listen(self) -> None:
        """From now on no message is due: `check_silent` tells whether one came all the same."""
        self._late = asyncio.create_task(self._next())

    def check_silent(self) -> None:
        """Refuse a message that came after the plan.

        Raises:
            InvalidRequest: names the part that came.
        """
        if self._late is None or not self._late.done() or self._late.cancelled():
            return
        if self._late.exception() is None and (message := self._late.result()) is not None:
            got = message.WhichOneof("part") or "nothing"
            raise InvalidRequest(
                f"nothing may follow the plan, got another {got}",
                field="part",
                got=got,
                allowed="the end of the stream",
            )

    async def close(self) -> None:
        """Stop listening."""
        if self._late is not None:
            self._late.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._late

    async def _next(self) -> Request | None:
        return await anext(self._requests, None)
