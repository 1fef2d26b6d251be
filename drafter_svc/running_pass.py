"""A pass in the worker thread, seen from the event loop: progress, result, stop.

Made by `queue.Ticket.start`. The seat is free when the thread has ended, not before, so two passes
never run at once, also when a caller went away.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from typing import Generic, TypeAlias, TypeVar

from drafter_svc.backend import WAITING_FOR_MEMORY
from skim.errors import DeadlineExceeded

T = TypeVar("T")
Progress: TypeAlias = Callable[[int, int], None]  # see `Backend.score`
Work: TypeAlias = Callable[[threading.Event, Progress], T]


class RunningPass(Generic[T]):
    """One pass.

    Args:
        worker: the one thread.
        work: called there as work(stop, progress).
        stop: set by anybody to abandon the pass.
        time_left: seconds to its deadline, or None.
        on_begin: called on the event loop when a pass that waited for memory has it.
        on_end: called on the event loop once the thread is done with it, with whether it finished.
    """

    def __init__(
        self,
        worker: Executor,
        work: Work[T],
        stop: threading.Event,
        *,
        time_left: Callable[[], float | None],
        on_end: Callable[[bool], None],
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._stop, self._on_begin = stop, on_begin
        self._time_left = time_left
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._done = asyncio.Event()
        self._latest: tuple[int, int] | None = None
        self._future: Future[T] = worker.submit(work, stop, self._report)
        self._future.add_done_callback(lambda _: self._from_thread(self._finish))

    async def progress(self) -> AsyncIterator[tuple[int, int]]:
        """Yield the latest (layers done, layers in all) as it changes, until the pass has ended.

        Layers done are WAITING_FOR_MEMORY while it waits for its weights.

        Raises:
            DeadlineExceeded: the deadline passed; the pass is told to stop.
        """
        told = None
        while True:
            self._changed.clear()
            if self._latest != told:
                told = self._latest
                if told is not None:
                    yield told
                continue
            if self._done.is_set():
                return
            try:
                await asyncio.wait_for(self._changed.wait(), self._time_left())
            except TimeoutError:
                self._stop.set()
                raise DeadlineExceeded("the deadline passed during the pass") from None

    async def result(self) -> T:
        """Wait for the end of the pass and return what `work` returned, or raise what it raised."""
        await self._done.wait()
        return self._future.result()

    def _report(self, done: int, total: int) -> None:
        def tell() -> None:
            if self._latest is not None and self._latest[0] == WAITING_FOR_MEMORY:
                self._on_begin()
            self._latest = (done, total)
            self._changed.set()

        self._from_thread(tell)

    def _from_thread(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._stop.set()

    def _finish(self) -> None:
        self._done.set()
        self._changed.set()
        self._on_end(self._future.exception() is None)
