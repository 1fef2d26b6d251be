"""Who gets the target next."""

from __future__ import annotations

import asyncio
import time

import pytest

from skim.errors import Busy, DeadlineExceeded
from target_svc.admission import Admission, Ticket


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(slots: int = 1, queue_limit: int = 8, default_deadline_s: float = 600.0):
    clock = Clock()
    admission = Admission(
        slots, queue_limit=queue_limit, default_deadline_s=default_deadline_s, clock=clock
    )
    return admission, clock


async def turns(ticket: Ticket) -> list[int]:
    return [ahead async for ahead in ticket.turns()]


async def test_a_free_slot_is_given_at_once() -> None:
    admission, _ = make()
    ticket = admission.enter("working", None)
    assert ticket.seated and await turns(ticket) == []


async def test_a_slot_goes_to_the_earliest_deadline_not_the_earliest_arrival() -> None:
    admission, clock = make()
    running = admission.enter("working", None)
    late = admission.enter("working", clock.now_s + 50)
    soon = admission.enter("working", clock.now_s + 5)
    running.leave()
    assert soon.seated and not late.seated


async def test_equal_deadlines_are_served_in_order_of_arrival() -> None:
    admission, _ = make()
    running = admission.enter("working", None)
    first, second = (admission.enter("working", 500.0) for _ in range(2))
    running.leave()
    assert first.seated and not second.seated


async def test_a_request_without_a_deadline_overtakes_later_ones_and_cannot_starve() -> None:
    admission, clock = make(default_deadline_s=60.0)
    running = admission.enter("working", None)
    patient = admission.enter("working", None)
    clock.now_s += 50
    newcomer = admission.enter("working", clock.now_s + 30)
    running.leave()
    assert patient.seated and not newcomer.seated


async def test_waiting_reports_how_many_are_ahead_whenever_that_changes() -> None:
    admission, clock = make()
    running = admission.enter("working", None)
    before = admission.enter("working", clock.now_s + 5)
    ticket = admission.enter("working", clock.now_s + 50)
    seen: list[int] = []

    async def watch() -> None:
        async for ahead in ticket.turns():
            seen.append(ahead)
            if ahead == 1:
                running.leave()
            else:
                before.leave()

    await asyncio.wait_for(watch(), 5)
    assert seen == [1, 0] and ticket.seated


async def test_one_more_than_may_wait_is_refused() -> None:
    admission, _ = make(queue_limit=1)
    admission.enter("working", None)
    admission.enter("working", None)
    with pytest.raises(Busy) as refused:
        admission.enter("working", None)
    assert refused.value.reason == "QUEUE_FULL" and refused.value.retry_after_s == 1.0
    assert admission.queued == 1


async def test_a_queue_of_none_still_seats_who_need_not_wait() -> None:
    admission, _ = make(queue_limit=0)
    assert admission.enter("working", None).seated
    with pytest.raises(Busy):
        admission.enter("working", None)


async def test_the_hint_is_the_measured_time_between_two_free_slots() -> None:
    admission, clock = make(slots=2, queue_limit=0)
    tickets = [admission.enter("working", None) for _ in range(2)]
    clock.now_s += 8
    tickets[0].leave()
    admission.enter("working", None)
    with pytest.raises(Busy) as refused:
        admission.enter("working", None)
    assert refused.value.retry_after_s == 4.0


async def test_leaving_the_queue_makes_room_in_it() -> None:
    admission, _ = make(queue_limit=1)
    admission.enter("working", None)
    waiting = admission.enter("working", None)
    waiting.leave()
    waiting.leave()
    assert admission.queued == 0 and admission.running == 1


async def test_the_full_lane_has_one_slot_and_does_not_take_a_working_one() -> None:
    admission, _ = make(slots=2)
    tickets = [admission.enter(lane, None) for lane in ("working", "full", "working", "full")]
    assert [ticket.seated for ticket in tickets] == [True, True, True, False]


async def test_a_deadline_that_passes_in_the_queue_ends_the_wait() -> None:
    admission = Admission(1, queue_limit=8, default_deadline_s=600.0)
    admission.enter("working", None)
    waiting = admission.enter("working", time.monotonic() + 0.01)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(turns(waiting), 5)
