"""One pass at a time: who waits for the drafter, in which order, and what runs now.

The service enters a request once its tokens are counted, waits for its turn, and starts its pass in
the one worker thread. Earliest deadline first: whoever can wait longest waits. A request without a
deadline counts as having a far one from its arrival on, so it moves up like the others. Refuses
with Busy when as many wait as may (the hint is measured), and with DeadlineExceeded at once when
the deadline cannot be met even at the best rate seen. Everything but the pass itself happens on one
event loop: no locks.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from drafter_svc.pass_rate import PassRate
from drafter_svc.running_pass import RunningPass, Work
from skim.errors import Busy, DeadlineExceeded

T = TypeVar("T")
FIRST_HINT_S = 1.0  # before any pass has finished nothing is known


class Ticket:
    """One request's place, from entering the queue to the end of its pass.

    Use it with `with`: leaving gives the place back, or stops the pass.
    """

    def __init__(
        self, queue: PassQueue, tokens: int, deadline_s: float | None, order: tuple[float, int]
    ) -> None:
        self.tokens = tokens
        self.deadline_s = deadline_s  # on the queue's clock
        self.order = order
        self.stop = threading.Event()
        self._queue = queue
        self._changed = asyncio.Event()
        self._started_s: float | None = None

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()

    def time_left(self) -> float | None:
        """Seconds to its deadline; None: it has none."""
        return None if self.deadline_s is None else self.deadline_s - self._queue.clock()

    async def turns(self) -> AsyncIterator[int]:
        """Yield how many requests are ahead, whenever that changes; end when it is this one's turn.

        Raises:
            DeadlineExceeded: the deadline passed first.
        """
        told = -1
        while self._queue.seated is not self:
            self._changed.clear()  # before looking: what changes while we yield is not lost
            ahead = self._queue.ahead_of(self)
            if ahead != told:
                told = ahead
                yield ahead
                continue
            try:
                await asyncio.wait_for(self._changed.wait(), self.time_left())
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed while waiting for the pass") from None

    def start(self, work: Work[T]) -> RunningPass[T]:
        """Start the pass in the worker thread; only when `turns` has ended."""
        queue = self._queue
        self._started_s = queue.clock()
        return RunningPass(
            queue.worker,
            work,
            self.stop,
            time_left=self.time_left,
            on_end=self._on_end,
            on_begin=self._on_begin,
        )

    def leave(self) -> None:
        """Give the place to the others; a pass that runs is told to stop. Idempotent."""
        self.stop.set()
        if self._started_s is None:
            self._queue.release(self)

    def notify(self) -> None:
        """Make `turns` look again."""
        self._changed.set()

    def _on_begin(self) -> None:
        """What it waited for memory says nothing about the rate of passes."""
        self._started_s = self._queue.clock()

    def _on_end(self, finished: bool) -> None:
        if finished and self._started_s is not None:
            self._queue.rate.add(self.tokens, self._queue.clock() - self._started_s)
        self._queue.release(self)


class PassQueue:
    """The seat at the drafter, and who waits for it.

    Args:
        limit: requests that may wait.
        default_deadline_s: what a request without a deadline counts as having.
        clock: seconds, monotonic.

    Attributes:
        on_idle: called whenever nobody runs or waits any more.
    """

    def __init__(
        self,
        *,
        limit: int,
        default_deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self.clock = clock
        self.rate = PassRate()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="pass")
        self.seated: Ticket | None = None
        self.on_idle: Callable[[], None] = lambda: None
        self._seated_s = 0.0
        self._default_deadline_s = default_deadline_s
        self._waiting: list[Ticket] = []
        self._arrivals = itertools.count()
        self._paused = False
        self._free = asyncio.Event()
        self._free.set()

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Passes that run, 0 or 1."""
        return int(self.seated is not None)

    def check_room(self) -> None:
        """Refuse early, before a prompt is uploaded in vain.

        Raises:
            Busy: as many wait as may; `retry_after_s` says when those ahead will be done.
        """
        if self.queued >= self.limit and (self.seated is not None or self._paused):
            raise Busy(
                f"{self.queued} requests wait for the drafter already",
                metadata={"limit": str(self.limit), "got": str(self.queued + 1)},
                retry_after_s=self._hint_s(),
            )

    def enter(self, tokens: int, deadline_s: float | None) -> Ticket:
        """Take a place.

        Args:
            tokens: what the pass costs; 0 for a scorer without a model.
            deadline_s: on the queue's clock, or None.
        Raises:
            Busy: see `check_room`.
            DeadlineExceeded: it cannot be met.
        """
        self.check_room()
        counts_as = self.clock() + self._default_deadline_s if deadline_s is None else deadline_s
        ticket = Ticket(self, tokens, deadline_s, (counts_as, next(self._arrivals)))
        self._check_deadline(ticket)
        self._waiting.append(ticket)
        self._waiting.sort(key=lambda waiting: waiting.order)
        self._seat_next()
        return ticket

    def ahead_of(self, ticket: Ticket) -> int:
        """Requests that come before this one, the running one included."""
        return self._waiting.index(ticket) + self.running if ticket in self._waiting else 0

    def release(self, ticket: Ticket) -> None:
        """Take a ticket out, wherever it is, and seat the next. Idempotent."""
        if self.seated is ticket:
            self.seated = None
            self._free.set()
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        self._seat_next()
        if self.seated is None and not self._waiting:
            self.on_idle()

    async def pause(self) -> None:
        """Start no pass any more, and wait for the one that runs."""
        self._paused = True
        await self._free.wait()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        self._seat_next()

    async def close(self) -> None:
        """Stop the running pass and end the worker thread; nothing may enter afterwards."""
        self._paused = True
        if self.seated is not None:
            self.seated.leave()
        await self._free.wait()
        self.worker.shutdown()

    def _seat_next(self) -> None:
        if self.seated is None and self._waiting and not self._paused:
            self.seated = self._waiting.pop(0)
            self._seated_s = self.clock()
            self._free.clear()
            self.seated.notify()
        for ticket in self._waiting:
            ticket.notify()

    def _seconds_for(self, waiting: list[Ticket], rate: float) -> float:
        """Seconds until the running pass and those of `waiting` are done at `rate` tokens/s."""
        seconds = sum(ticket.tokens for ticket in waiting) / rate
        if self.seated is not None:
            seconds += max(0.0, self.seated.tokens / rate - (self.clock() - self._seated_s))
        return seconds

    def _hint_s(self) -> float:
        rate = self.rate.mean
        return self._seconds_for(self._waiting, rate) if rate else FIRST_HINT_S

    def _check_deadline(self, ticket: Ticket) -> None:
        left_s, rate, needed_s = ticket.time_left(), self.rate.best, 0.0
        if left_s is None:
            return
        if rate:
            before = [waiting for waiting in self._waiting if waiting.order < ticket.order]
            needed_s = self._seconds_for([*before, ticket], rate)
        if left_s <= needed_s:
            left_s = max(0.0, left_s)
            raise DeadlineExceeded(
                f"the deadline is in {left_s:.3f} s and the pass takes at least {needed_s:.3f} s "
                f"with those before it",
                reason="DEADLINE_TOO_SHORT",
                metadata={"limit": f"{left_s:.3f}", "got": f"{needed_s:.3f}"},
            )
