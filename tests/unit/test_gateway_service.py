"""The edge of the servicer: deadlines handed on, and sessions whose caller is gone."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest

from gateway.outbox import Outbox
from gateway.service import _start, legs_timeout_s
from skim.errors import InvalidRequest


@pytest.mark.parametrize(
    ("remaining_s", "timeout_s"),
    [
        (None, 60.0),  # no deadline: the longest request
        (100.0, 60.0),
        (20.0, 19.9),  # so that the caller still hears why
        (1.0, 0.95),  # of a short deadline, a twentieth
        (0.0, 0.0),
    ],
)
def test_the_services_get_the_callers_deadline_less_a_margin(
    remaining_s: float | None, timeout_s: float
) -> None:
    assert legs_timeout_s(remaining_s, 60.0) == pytest.approx(timeout_s)


class FakeContext:
    """A call that ends when told to."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def end(self) -> None:
        for callback in self.callbacks:
            callback(self)


async def test_a_session_is_cancelled_when_its_call_ends() -> None:
    context, outbox = FakeContext(), Outbox()
    task = _start(asyncio.Event().wait(), outbox, context)  # type: ignore[arg-type]
    context.end()
    async with asyncio.timeout(5):
        assert await outbox.get() is None
    assert task.cancelled()


async def test_a_session_that_fails_unheard_leaves_no_traceback() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, said: complaints.append(said))

    async def fail() -> None:
        raise InvalidRequest("nobody listens")

    outbox = Outbox()
    task = _start(fail(), outbox, FakeContext())  # type: ignore[arg-type]
    assert await outbox.get() is None
    del task
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []
