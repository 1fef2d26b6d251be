"""The drafter's queue: order, bounds, hints, deadlines, stopping, pausing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from drafter_svc.backend import WAITING_FOR_MEMORY
from drafter_svc.pass_rate import PassRate
from drafter_svc.queue import PassQueue, Ticket
from skim.errors import Busy, Cancelled, DeadlineExceeded

WAIT_S = 10.0


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Gate:
    """Work that reports once, then waits until it is opened or stopped."""

    def __init__(self, result: object = None) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.result = result

    def __call__(self, stop: threading.Event, progress) -> object:
        progress(1, 2)
        self.entered.set()
        while not self.open.wait(0.005):
            if stop.is_set():
                raise Cancelled("stopped")
        return self.result


@pytest.fixture
async def clock() -> Clock:
    return Clock()


@pytest.fixture
async def queue(clock: Clock) -> AsyncIterator[PassQueue]:
    made = PassQueue(limit=3, default_deadline_s=600.0, clock=clock)
    yield made
    await asyncio.wait_for(made.close(), WAIT_S)


async def its_turn(ticket: Ticket) -> list[int]:
    async def collect() -> list[int]:
        return [ahead async for ahead in ticket.turns()]

    return await asyncio.wait_for(collect(), WAIT_S)


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, WAIT_S)


async def run(ticket: Ticket, work) -> object:
    await its_turn(ticket)
    return await asyncio.wait_for(ticket.start(work).result(), WAIT_S)


async def test_result_of_the_pass_is_returned_and_the_seat_is_free_again(queue):
    with queue.enter(10, None) as ticket:
        assert await run(ticket, lambda stop, progress: 42) == 42
    assert (queue.running, queue.queued) == (0, 0)


async def test_error_of_a_pass_reaches_its_caller_and_the_next_pass_runs(queue):
    def broken(stop, progress):
        raise ZeroDivisionError

    with queue.enter(10, None) as first, queue.enter(10, None) as second:
        with pytest.raises(ZeroDivisionError):
            await run(first, broken)
        assert await run(second, lambda stop, progress: "fine") == "fine"


async def test_progress_of_the_pass_is_seen_while_it_runs(queue):
    gate = Gate("done")
    with queue.enter(10, None) as ticket:
        await its_turn(ticket)
        running = ticket.start(gate)
        seen = []
        async for done, total in running.progress():
            seen.append((done, total))
            gate.open.set()
        assert seen == [(1, 2)]
        assert await running.result() == "done"


async def test_earliest_deadline_comes_first_and_none_counts_as_far(queue, clock):
    gate = Gate()
    with queue.enter(1, None) as running:
        await its_turn(running)
        passed = running.start(gate)
        tickets = {
            "none": queue.enter(1, None),
            "late": queue.enter(1, clock() + 700),
            "soon": queue.enter(1, clock() + 5),
        }
        assert {name: queue.ahead_of(t) for name, t in tickets.items()} == {
            "soon": 1,
            "none": 2,
            "late": 3,
        }
        gate.open.set()
        await passed.result()
    order = []
    for _ in tickets:
        await asyncio.sleep(0)
        name = next(name for name, ticket in tickets.items() if queue.seated is ticket)
        order.append(name)
        tickets[name].leave()
    assert order == ["soon", "none", "late"]


async def test_equal_deadlines_are_served_in_order_of_arrival(queue, clock):
    with queue.enter(1, None):
        first, second = queue.enter(1, clock() + 9), queue.enter(1, clock() + 9)
        assert (queue.ahead_of(first), queue.ahead_of(second)) == (1, 2)
        first.leave()
        second.leave()


async def test_waiting_request_is_told_whenever_the_number_ahead_changes(queue):
    with queue.enter(1, None) as seated, queue.enter(1, None) as other:
        last = queue.enter(1, None)
        told = []

        async def listen() -> None:
            async for ahead in last.turns():
                told.append(ahead)
                (other if ahead == 2 else seated).leave()

        await asyncio.wait_for(listen(), WAIT_S)
        assert told == [2, 1]
        last.leave()


async def test_leaving_while_queued_frees_the_place_at_once(queue):
    gate = Gate()
    with queue.enter(1, None) as running:
        await its_turn(running)
        passed = running.start(gate)
        waiting = [queue.enter(1, None) for _ in range(3)]
        with pytest.raises(Busy):
            queue.enter(1, None)
        waiting[1].leave()
        assert queue.queued == 2
        queue.enter(1, None).leave()
        for ticket in waiting:
            ticket.leave()
        gate.open.set()
        await passed.result()


async def test_leaving_during_the_pass_stops_it_and_only_then_frees_the_seat(queue):
    gate = Gate()
    first, second = queue.enter(1, None), queue.enter(1, None)
    await its_turn(first)
    running = first.start(gate)
    await entered(gate)
    first.leave()
    assert queue.seated is first
    with pytest.raises(Cancelled):
        await asyncio.wait_for(running.result(), WAIT_S)
    assert await run(second, lambda stop, progress: "ran") == "ran"


async def test_full_queue_is_refused_with_a_hint_from_the_measured_rate(queue, clock):
    queue.rate.add(4_000, 2.0)  # 2,000 tokens/s
    tickets = [queue.enter(1_000, None) for _ in range(4)]
    clock.now_s += 0.2  # of the running 0.5 s
    with pytest.raises(Busy) as caught:
        queue.enter(1_000, None)
    assert caught.value.metadata == {"limit": "3", "got": "4"}
    assert caught.value.retry_after_s == pytest.approx(0.3 + 3 * 0.5)
    for ticket in tickets:
        ticket.leave()


async def test_full_queue_before_any_measurement_hints_at_a_second(queue):
    tickets = [queue.enter(1_000, None) for _ in range(4)]
    with pytest.raises(Busy) as caught:
        queue.check_room()
    assert caught.value.retry_after_s == 1.0
    for ticket in tickets:
        ticket.leave()


async def test_empty_seat_takes_a_request_also_when_none_may_wait(clock):
    queue = PassQueue(limit=0, default_deadline_s=600.0, clock=clock)
    with queue.enter(1, None) as ticket:
        assert await its_turn(ticket) == []
        with pytest.raises(Busy):
            queue.enter(1, None)
    await queue.close()


async def test_deadline_that_cannot_be_met_is_refused_up_front(queue, clock):
    queue.rate.add(4_096, 2.048)  # 2,000 tokens/s
    with queue.enter(2_000, None), queue.enter(2_000, clock() + 3):
        # 1 s runs, 1 s has the earlier deadline, 1 s is its own.
        with pytest.raises(DeadlineExceeded, match="at least 3.000 s") as caught:
            queue.enter(2_000, clock() + 3.0)
        assert caught.value.reason == "DEADLINE_TOO_SHORT"
        queue.enter(2_000, clock() + 3.1).leave()
        # One with an earlier deadline overtakes the waiting one, so it needs 2 s.
        queue.enter(2_000, clock() + 2.1).leave()


async def test_deadline_is_not_judged_before_anything_is_measured(queue, clock):
    queue.enter(1_000_000, clock() + 0.001).leave()
    queue.rate.add(100, 10.0)  # short passes tell nothing about long ones
    queue.enter(1_000_000, clock() + 0.001).leave()


async def test_deadline_in_the_past_is_refused(queue, clock):
    with pytest.raises(DeadlineExceeded):
        queue.enter(1, clock() - 1.0)


async def test_deadline_that_passes_while_waiting_ends_the_wait(queue, clock):
    with queue.enter(1, None), queue.enter(1, clock() + 0.05) as waiting:
        with pytest.raises(DeadlineExceeded, match="waiting"):
            await its_turn(waiting)


async def test_deadline_that_passes_during_the_pass_stops_it(queue, clock):
    gate = Gate()
    with queue.enter(1, clock() + 0.05) as ticket:
        await its_turn(ticket)
        running = ticket.start(gate)
        with pytest.raises(DeadlineExceeded, match="during the pass"):
            async for _ in running.progress():
                pass
        with pytest.raises(Cancelled):
            await asyncio.wait_for(running.result(), WAIT_S)


async def test_finished_passes_are_measured_and_failed_ones_are_not(queue, clock):
    def slow(stop, progress):
        clock.now_s += 2.0

    def broken(stop, progress):
        clock.now_s += 100.0
        raise ZeroDivisionError

    with queue.enter(500, None) as ticket:
        await run(ticket, slow)
    with queue.enter(500, None) as ticket:
        with pytest.raises(ZeroDivisionError):
            await run(ticket, broken)
    assert queue.rate.mean == 250.0


async def test_pause_waits_for_the_pass_and_starts_none_until_resumed(queue):
    gate = Gate()
    first, second = queue.enter(1, None), queue.enter(1, None)
    await its_turn(first)
    running = first.start(gate)
    await entered(gate)
    pausing = asyncio.create_task(queue.pause())
    await asyncio.sleep(0)
    assert not pausing.done()
    gate.open.set()
    await asyncio.wait_for(pausing, WAIT_S)
    await running.result()
    assert queue.seated is None and queue.queued == 1
    queue.resume()
    assert queue.seated is second
    second.leave()


async def test_waiting_for_memory_is_told_and_does_not_count_in_the_rate(queue, clock):
    begun, ended = threading.Event(), threading.Event()

    def work(stop, progress):
        progress(WAITING_FOR_MEMORY, 2)
        assert begun.wait(WAIT_S)
        progress(0, 2)
        assert ended.wait(WAIT_S)

    with queue.enter(500, None) as ticket:
        await its_turn(ticket)
        running, seen = ticket.start(work), []
        async for done, _ in running.progress():
            seen.append(done)
            clock.now_s += 60.0 if done == WAITING_FOR_MEMORY else 2.0
            (begun if done == WAITING_FOR_MEMORY else ended).set()
        await running.result()
    assert seen == [WAITING_FOR_MEMORY, 0]
    assert queue.rate.mean == 250.0


async def test_idleness_is_told_when_nobody_runs_or_waits_any_more(queue):
    told = []
    queue.on_idle = lambda: told.append((queue.running, queue.queued))
    with queue.enter(1, None) as first, queue.enter(1, None) as second:
        await run(first, lambda stop, progress: None)
        assert told == []
        await run(second, lambda stop, progress: None)
    assert set(told) == {(0, 0)}


def test_rate_is_over_all_tokens_of_the_last_passes():
    rate = PassRate()
    assert (rate.mean, rate.best) == (0.0, 0.0)
    rate.add(10, 1.0)
    rate.add(4_090, 1.0)
    assert (rate.mean, rate.best) == (2_050.0, 4_090.0)
    for _ in range(8):
        rate.add(3_000, 1.0)
    assert (rate.mean, rate.best) == (3_000.0, 3_000.0)


def test_pass_without_cost_is_no_measurement():
    rate = PassRate()
    rate.add(0, 1.0)
    rate.add(5, 0.0)
    assert rate.mean == 0.0
