"""Rooms for full contexts: who is parked for them, who comes back when, and who is refused."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kernels.ipc.messages import Copied, Idle, Quiesce, Refused, Region, Unmapped, Want
from skim.errors import Busy, DeadlineExceeded
from target_svc.memory.landlord import Landlord, Room
from tests.fixtures.tenant import NAME, TIMEOUT_S, UNIT, hello, house


class Context:
    """A full context that takes what it was promised, as the engine does, in a task of its own."""

    def __init__(self, landlord: Landlord, num_bytes: int, **options: float) -> None:
        self.entered: asyncio.Future[Room] = asyncio.get_running_loop().create_future()
        self.end = asyncio.Event()
        self.task = asyncio.create_task(self._run(landlord, num_bytes, options))

    async def _run(self, landlord: Landlord, num_bytes: int, options: dict[str, float]) -> None:
        async with landlord.room(num_bytes, **options) as room:
            self.entered.set_result(room)
            await self.end.wait()

    async def room(self) -> Room:
        done, _ = await asyncio.wait(
            {self.entered, self.task}, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        assert done
        if not self.entered.done():
            self.task.result()
        return self.entered.result()

    async def leave(self) -> None:
        self.end.set()
        await self.task


async def test_where_enough_is_free_nobody_is_parked(tmp_path: Path) -> None:
    async with house(tmp_path, units=16) as home:
        await home.filled()
        async with home.landlord.room(12 * UNIT) as room:
            assert room.parked == () and room.park_s == 0.0
        assert home.states == {NAME: "RESIDENT"}


async def test_a_drafter_gives_way_to_a_full_context_and_comes_back_after_it(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, units=16) as home:
        tenant = await home.filled()
        context = Context(home.landlord, 13 * UNIT)
        await tenant.vacate(workspace_bytes=5)
        room = await context.room()
        assert room.parked == (NAME,) and 0 < room.park_s <= room.wait_s
        taken = home.physical.create(13 * UNIT)  # the engine's context
        tenant.send(Want())
        assert (await tenant.expect(Refused)).reason == "NO_ROOM"
        taken.close()
        await context.leave()
        assert await tenant.come_back() == 3


async def test_an_unwanted_drafter_comes_back_too_under_auto(tmp_path: Path) -> None:
    async with house(tmp_path, units=16) as home:
        tenant = await home.filled()
        context = Context(home.landlord, 13 * UNIT)
        await tenant.vacate()
        await context.room()
        await context.leave()
        assert await tenant.come_back() == 3


async def test_a_drafter_that_fits_beside_the_context_comes_back_while_it_lives(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, units=16) as home:
        tenant = await home.filled()
        ballast = home.physical.create(8 * UNIT)
        context = Context(home.landlord, 6 * UNIT)
        await tenant.vacate()
        await context.room()
        home.physical.create(6 * UNIT).close()  # promised, not taken: still not free for others
        tenant.send(Want())
        assert (await tenant.expect(Refused)).reason == "NO_ROOM"
        ballast.close()
        tenant.send(Want())
        assert await tenant.come_back() == 3
        await context.leave()


async def test_beside_a_context_the_workspace_must_fit_too(tmp_path: Path) -> None:
    async with house(tmp_path, units=16) as home:
        tenant = await home.filled()
        ballast = home.physical.create(6 * UNIT)
        context = Context(home.landlord, 8 * UNIT)
        await tenant.vacate(workspace_bytes=3 * UNIT)
        await context.room()
        ballast.close()  # 8 units are free beside the promise: 4 + 3 fit
        tenant.send(Want())
        assert await tenant.come_back() == 3
        await home.until("RESIDENT")
        await context.leave()
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.vacate(workspace_bytes=5 * UNIT)
        await parking
        async with home.landlord.room(8 * UNIT):
            tenant.send(Want())
            assert (await tenant.expect(Refused)).reason == "NO_ROOM"


async def test_another_drafter_s_region_is_no_part_of_the_promise(tmp_path: Path) -> None:
    async with house(tmp_path, units=16) as home:
        await home.filled(hello("other"))
        tenant = await home.filled()
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.vacate()
        await parking
        async with home.landlord.room(9 * UNIT):  # 16 less the other's 4: 3 are left
            tenant.send(Want())
            assert (await tenant.expect(Refused)).reason == "NO_ROOM"


async def test_a_taken_promise_is_not_counted_twice(tmp_path: Path) -> None:
    async with house(tmp_path, units=16) as home:
        tenant = await home.filled()
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.vacate()
        await parking
        async with home.landlord.room(12 * UNIT):
            taken = home.physical.create(12 * UNIT)
            tenant.send(Want())
            assert await tenant.come_back() == 3
        taken.close()


async def test_more_than_there_is_is_refused_without_parking_anybody(tmp_path: Path) -> None:
    async with house(tmp_path, units=16, budget_bytes=12 * UNIT) as home:
        await home.filled()
        with pytest.raises(Busy) as refused:
            async with home.landlord.room(13 * UNIT):
                pass
        assert refused.value.reason == "NO_ROOM"
        assert refused.value.metadata == {
            "limit_bytes": str(8 * UNIT),
            "got_bytes": str(13 * UNIT),
        }
        assert home.states == {NAME: "RESIDENT"}


async def test_where_parking_does_not_help_the_room_is_refused_and_all_come_back(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, units=16) as home:
        tenant = await home.filled()
        ballast = home.physical.create(8 * UNIT)
        context = Context(home.landlord, 10 * UNIT)
        await tenant.vacate()
        with pytest.raises(Busy) as refused:
            await context.room()
        assert refused.value.metadata["limit_bytes"] == str(8 * UNIT)
        assert await tenant.come_back() == 3
        ballast.close()


async def test_policy_never_parks_nobody_for_a_context(tmp_path: Path) -> None:
    async with house(tmp_path, units=16, policy="never") as home:
        await home.filled()
        with pytest.raises(Busy) as refused:
            async with home.landlord.room(13 * UNIT):
                pass
        assert refused.value.reason == "NO_ROOM"
        async with home.landlord.room(12 * UNIT):
            pass
        assert await home.landlord.largest_room() == 12 * UNIT
        assert home.states == {NAME: "RESIDENT"}


async def test_a_tenant_that_hangs_is_cut_off_for_the_context(tmp_path: Path) -> None:
    async with house(tmp_path, units=16, park_timeout_s=0.02) as home:
        tenant = await home.filled()
        tenant.let_go()
        async with home.landlord.room(13 * UNIT) as room:
            assert room.parked == (NAME,)
        assert await tenant.closed()


async def test_a_short_park_leads_to_a_refusal_with_what_can_be_had(tmp_path: Path) -> None:
    async with house(tmp_path, units=16, park_timeout_s=0.02) as home:
        await home.filled()  # holds the region's descriptor to the end
        with pytest.raises(Busy) as refused:
            async with home.landlord.room(13 * UNIT):
                pass
        assert refused.value.metadata["limit_bytes"] == str(12 * UNIT)
        assert home.states == {NAME: "FAILED"}


async def test_a_region_nobody_holds_goes_first(tmp_path: Path) -> None:
    async with house(tmp_path, units=16) as home:
        orphan = await home.filled(hello("orphan", units=2))
        await home.filled(hello("leased", units=4))
        orphan.kill()
        async with asyncio.timeout(TIMEOUT_S):
            async for info in home.landlord.watch("orphan"):
                if not info.lease_pid:
                    break
        async with home.landlord.room(12 * UNIT) as room:
            assert room.parked == ("orphan",)
        assert home.states == {"leased": "RESIDENT", "orphan": "PARKED"}


async def test_one_context_at_a_time(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        first = Context(home.landlord, UNIT)
        await first.room()
        second = Context(home.landlord, UNIT)
        with pytest.raises(DeadlineExceeded):
            async with home.landlord.room(UNIT, deadline_s=time.monotonic() + 0.02):
                pass
        assert not second.entered.done()
        await first.leave()
        await second.room()
        await second.leave()


async def test_a_room_that_waits_for_its_drafter_ends_with_its_deadline(tmp_path: Path) -> None:
    async with house(tmp_path, units=16, park_timeout_s=60.0) as home:
        tenant = await home.filled()
        with pytest.raises(DeadlineExceeded):
            async with home.landlord.room(13 * UNIT, deadline_s=time.monotonic() + 0.02):
                pass
        await tenant.vacate()  # the park goes on to its end, and the drafter comes back
        assert await tenant.come_back() == 3


async def test_a_caller_that_leaves_gives_its_turn_to_the_next(tmp_path: Path) -> None:
    async with house(tmp_path, units=16, park_timeout_s=60.0) as home:
        tenant = await home.filled()
        first = Context(home.landlord, 13 * UNIT)
        await tenant.expect(Quiesce)
        first.task.cancel()
        await asyncio.wait({first.task})
        second = Context(home.landlord, 13 * UNIT)
        tenant.let_go()
        tenant.send(Unmapped(1, 0))
        # Between the two the drafter may have come back: then it is asked once more.
        while not second.entered.done():
            getting = asyncio.create_task(tenant.receive())
            await asyncio.wait({getting, second.entered}, return_when=asyncio.FIRST_COMPLETED)
            if second.entered.done():
                getting.cancel()
                break
            match getting.result():
                case Region(generation=generation):
                    tenant.send(Copied(generation, 4 * UNIT, 2, done=True))
                case Quiesce(generation=generation):
                    tenant.let_go()
                    tenant.send(Unmapped(generation, 0))
        await second.leave()


async def test_a_score_that_waits_goes_before_the_next_context(tmp_path: Path) -> None:
    async with house(tmp_path, units=16, min_resident_s=0.0) as home:
        tenant = await home.filled()
        first = Context(home.landlord, 13 * UNIT)
        await tenant.vacate()
        await first.room()
        tenant.send(Want())
        await tenant.expect(Refused)
        second = Context(home.landlord, 13 * UNIT)
        await asyncio.sleep(0)
        await first.leave()
        assert await tenant.come_back() == 3  # the Score's turn
        await tenant.vacate()
        await second.room()
        await second.leave()


async def test_nobody_comes_back_unasked_between_two_contexts(tmp_path: Path) -> None:
    async with house(tmp_path, units=16) as home:
        tenant = await home.filled()
        first = Context(home.landlord, 13 * UNIT)
        await tenant.vacate()
        await first.room()
        second = Context(home.landlord, 13 * UNIT)
        await asyncio.sleep(0)
        await first.leave()
        room = await second.room()
        assert room.parked == () and home.landlord.regions()[0].generation == 2
        await second.leave()
        assert await tenant.come_back() == 3


class Clock:
    """Time that passes when somebody sleeps; `slept` says for how long each asked."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


async def test_a_drafter_that_came_back_stays_for_its_time(tmp_path: Path) -> None:
    clock = Clock()
    options = {"clock": clock, "sleep": clock.sleep, "min_resident_s": 2.0}
    async with house(tmp_path, units=16, **options) as home:
        tenant = await home.filled()
        async with AsyncExitStack() as stack:
            vacating = asyncio.create_task(tenant.vacate())
            await stack.enter_async_context(home.landlord.room(13 * UNIT))
            await vacating
        await tenant.come_back()
        await home.until("RESIDENT")
        assert clock.slept == []  # the first time there was nothing to wait for
        clock.now_s += 0.5
        vacating = asyncio.create_task(tenant.vacate())
        async with home.landlord.room(13 * UNIT) as room:
            assert room.wait_s == pytest.approx(1.5)
            assert clock.slept == [pytest.approx(1.5)]
        await vacating


async def test_policy_always_parks_when_idle_and_returns_only_when_wanted(tmp_path: Path) -> None:
    async with house(tmp_path, policy="always") as home:
        tenant = await home.filled()
        await tenant.vacate()  # nobody wants it
        assert (await home.until("PARKED")).generation == 2
        tenant.send(Want())
        assert await tenant.come_back() == 3
        await home.until("RESIDENT")
        tenant.send(Idle())
        await tenant.vacate()
        assert (await home.until("PARKED")).generation == 4
        async with home.landlord.room(UNIT):
            pass
        assert home.states == {NAME: "PARKED"}


async def test_policy_always_parks_at_once_where_idle_came_before_the_last_layer(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, policy="always") as home:
        tenant = await home.filled()
        await tenant.vacate()
        tenant.send(Want())
        region = await tenant.expect(Region)
        tenant.send(Idle())
        tenant.send(Copied(region.generation, 4 * UNIT, 2, done=True))
        await tenant.vacate()
        assert (await home.until("PARKED")).generation == 4


async def test_the_largest_room_counts_every_region_as_parked(tmp_path: Path) -> None:
    async with house(tmp_path, units=16, budget_bytes=14 * UNIT) as home:
        await home.filled()
        await home.filled(hello("other", units=3))
        home.physical.create(2 * UNIT)
        assert await home.landlord.largest_room() == 12 * UNIT


async def test_a_closing_landlord_ends_who_waits_for_room(tmp_path: Path) -> None:
    async with house(tmp_path, units=16, park_timeout_s=60.0) as home:
        tenant = await home.filled()
        context = Context(home.landlord, 13 * UNIT)
        await tenant.expect(Quiesce)
        await asyncio.wait_for(home.landlord.close(), TIMEOUT_S)
        await asyncio.wait({context.task}, timeout=TIMEOUT_S)
        assert context.task.done() and context.task.exception() is not None
