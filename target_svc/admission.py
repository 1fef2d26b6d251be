"""Decide who gets the target next: bounded queues before the slots of the two contexts.

The pipeline enters a lane once it knows what will be prefilled, waits for its turn, and leaves when
the engine has freed the sequence. Two lanes: `working` has the slots of the working context, `full`
has one, for one full context exists at a time. Refuses with Busy, and a hint measured on the
requests before, when as many wait as may.

Earliest deadline first: whoever can wait longest waits, so the fewest requests run into their
deadline. A request without one counts as having a far one from its arrival on, so it moves up like
everybody else and cannot starve. Touched from one event loop only: no locks.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import Literal

from skim.errors import Busy, DeadlineExceeded

LaneName = Literal["working", "full"]
# A request's time in its slot moves the mean by a fifth: five requests tell a new load.
WEIGHT = 0.2
FIRST_HINT_S = 1.0  # before any request has finished nothing is known


class Lane:
    """Slots of one kind, and who waits for them."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.waiting: list[Ticket] = []
        self.running: set[Ticket] = set()
        self.held_s = 0.0  # running mean of the time a request holds its slot
        self.seatings = 0  # slots given since the start

    def seat(self) -> None:
        """Give free slots to those whose deadline comes first, and tell the others."""
        self.waiting.sort(key=lambda ticket: ticket.order)
        while self.waiting and len(self.running) < self.slots:
            self.waiting.pop(0)._seat()
            self.seatings += 1
        for ticket in self.waiting:
            ticket._changed.set()


class Ticket:
    """One request's place, from entering a lane to leaving it."""

    def __init__(self, lane: Lane, order: tuple[float, int], clock: Callable[[], float]) -> None:
        self.order = order
        self._lane = lane
        self._clock = clock
        self._changed = asyncio.Event()
        self._seated_s: float | None = None
        self._left = False

    @property
    def ahead(self) -> int:
        """Requests that will be seated before this one."""
        return self._lane.waiting.index(self) if self in self._lane.waiting else 0

    @property
    def seated(self) -> bool:
        """Whether it holds a slot."""
        return self._seated_s is not None and not self._left

    async def turns(self) -> AsyncIterator[int]:
        """Yield how many are ahead, at once and whenever that changes; end with the slot.

        Raises:
            DeadlineExceeded: the deadline passed first.
        """
        told = -1
        while not self.seated:
            self._changed.clear()  # before looking: what changes while we yield is not lost
            if self.ahead != told:
                told = self.ahead
                yield told
                continue
            try:
                await asyncio.wait_for(self._changed.wait(), self.order[0] - self._clock())
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed while waiting for a slot") from None

    def leave(self) -> None:
        """Give the slot, or the place in the queue, to the others. Idempotent."""
        if self._left:
            return
        self._left = True
        lane = self._lane
        if self._seated_s is not None:
            held_s = self._clock() - self._seated_s
            lane.held_s += (held_s - lane.held_s) * (WEIGHT if lane.held_s else 1.0)
            lane.running.discard(self)
        else:
            lane.waiting.remove(self)
        lane.seat()

    def _seat(self) -> None:
        self._seated_s = self._clock()
        self._lane.running.add(self)
        self._changed.set()


class Admission:
    """The lanes, and how many may wait before them altogether."""

    def __init__(
        self,
        slots: int,
        *,
        queue_limit: int,
        default_deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lanes: dict[LaneName, Lane] = {"working": Lane(slots), "full": Lane(1)}
        self._queue_limit = queue_limit
        self._default_deadline_s = default_deadline_s
        self._clock = clock
        self._arrivals = itertools.count()

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

    @property
    def running(self) -> int:
        """Requests that hold one."""
        return sum(len(lane.running) for lane in self._lanes.values())

    @property
    def seatings(self) -> int:
        """Slots given since the start: unchanged means that nobody new has come to run."""
        return sum(lane.seatings for lane in self._lanes.values())

    def hint_s(self, name: LaneName) -> float:
        """Seconds until a place comes free, as measured on the requests before."""
        lane = self._lanes[name]
        return max(lane.held_s / lane.slots, 0.1) if lane.held_s else FIRST_HINT_S

    def enter(self, name: LaneName, deadline_s: float | None) -> Ticket:
        """Take a place in a lane; `Ticket.leave` gives it back.

        Args:
            name: which lane.
            deadline_s: on the clock given at construction, or None.
        Raises:
            Busy: as many wait as may; `retry_after_s` says when a place comes free, as measured.
        """
        lane = self._lanes[name]
        must_wait = len(lane.running) >= lane.slots
        if must_wait and self.queued >= self._queue_limit:
            raise Busy(
                f"the target's queue is full: {self.queued} requests wait",
                got=self.queued,
                allowed=f"at most {self._queue_limit}",
                retry_after_s=self.hint_s(name),
            )
        until_s = self._clock() + self._default_deadline_s
        order = (until_s if deadline_s is None else deadline_s, next(self._arrivals))
        ticket = Ticket(lane, order, self._clock)
        lane.waiting.append(ticket)
        lane.seat()
        return ticket
