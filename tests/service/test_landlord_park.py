"""Park and unpark by people, over real sockets and a fake GPU that counts as a GPU does."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from kernels.ipc.messages import Copied, Idle, Parked, Quiesce, Refused, Region, Unmapped, Want
from skim.errors import Aborted, Busy, NotFound, PreconditionFailed, Unavailable
from tests.fixtures.tenant import NAME, TENSORS, TIMEOUT_S, UNIT, hello, house
from tests.tools import open_descriptors


async def unparked(landlord, **expect) -> list:
    return [info async for info in landlord.unpark(NAME, **expect)]


async def test_a_park_frees_the_region_and_says_how_many_bytes(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        assert home.physical.used_bytes() == 4 * UNIT
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.vacate(workspace_bytes=77)
        report = await parking
        assert (report.freed_bytes, report.workspace_bytes) == (4 * UNIT, 77)
        assert (report.info.state, report.info.generation) == ("PARKED", 2)
        assert not report.already_parked and report.park_s > 0
        assert home.physical.used_bytes() == 0


async def test_an_unpark_gives_new_memory_and_reports_the_copy(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.vacate()
        await parking
        unparking = asyncio.create_task(unparked(home.landlord, expect_generation=2))
        region = await tenant.expect(Region)
        assert region == Region(3, loaded=False, tensors=None) and len(tenant.fds) == 1
        tenant.send(Copied(3, UNIT, 1, done=False))
        tenant.send(Copied(3, 4 * UNIT, 2, done=True))
        infos = await unparking
        assert [info.state for info in infos] == ["UNPARKING", "UNPARKING", "RESIDENT"]
        assert [info.copied_bytes for info in infos] == [0, UNIT, 4 * UNIT]
        assert [info.layers_ready for info in infos] == [0, 1, 2]
        assert {info.generation for info in infos} == {3}
        assert home.physical.used_bytes() == 4 * UNIT


async def test_a_second_park_finds_it_parked(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await home.parked()
        for seen in (0, 1, 2):  # any, the one it had when resident, the one it has now
            report = await home.landlord.park(NAME, expect_generation=seen)
            assert report.already_parked and report.freed_bytes == 0
            assert report.info.generation == 2


async def test_two_parks_at_once_are_one(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        first = asyncio.create_task(home.landlord.park(NAME))
        await tenant.expect(Quiesce)
        second = asyncio.create_task(home.landlord.park(NAME, expect_generation=1))
        tenant.let_go()
        tenant.send(Unmapped(1, 0))
        reports = await asyncio.gather(first, second)
        assert [report.info.generation for report in reports] == [2, 2]
        assert [report.freed_bytes for report in reports] == [4 * UNIT] * 2


@pytest.mark.parametrize("seen", [3, 5])
async def test_a_generation_that_was_never_seen_is_refused(tmp_path: Path, seen: int) -> None:
    async with house(tmp_path) as home:
        await home.parked()
        with pytest.raises(PreconditionFailed) as refused:
            await home.landlord.park(NAME, expect_generation=seen)
        assert refused.value.reason == "GENERATION_MISMATCH"
        assert refused.value.metadata == {"got": str(seen), "allowed": "2"}
        with pytest.raises(PreconditionFailed):
            await unparked(home.landlord, expect_generation=seen)


async def test_a_stale_unpark_of_a_parked_region_is_refused(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await home.parked()
        with pytest.raises(PreconditionFailed):
            await unparked(home.landlord, expect_generation=1)


async def test_an_unpark_of_a_resident_region_is_done_at_once(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await home.filled()
        infos = await unparked(home.landlord, expect_generation=1)
        assert [(info.state, info.generation) for info in infos] == [("RESIDENT", 1)]


async def test_an_unpark_while_parking_comes_after_it(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        parking = asyncio.create_task(home.landlord.park(NAME))
        await home.until("PARKING")
        unparking = asyncio.create_task(unparked(home.landlord))
        await tenant.vacate()
        assert (await parking).info.generation == 2
        assert await tenant.come_back() == 3
        assert (await unparking)[-1].state == "RESIDENT"


async def test_a_park_while_unparking_interrupts_the_copy(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.parked()
        unparking = asyncio.create_task(unparked(home.landlord))
        await tenant.expect(Region)
        parking = asyncio.create_task(home.landlord.park(NAME, expect_generation=3))
        await tenant.vacate()
        assert (await parking).freed_bytes == 4 * UNIT
        with pytest.raises(Unavailable) as interrupted:
            await unparking
        assert interrupted.value.reason == "UNPARK_INTERRUPTED"


async def test_a_region_that_a_person_parked_comes_back_for_a_score(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.parked()
        tenant.send(Want())
        assert await tenant.come_back() == 3
        assert (await home.until("RESIDENT")).generation == 3


async def test_an_unpark_without_a_tenant_says_that_nobody_could_copy(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.parked()
        tenant.kill()
        await home.no_lease()
        with pytest.raises(PreconditionFailed) as refused:
            await unparked(home.landlord)
        assert refused.value.reason == "NO_TENANT"


async def test_a_half_copied_region_without_a_tenant_cannot_be_unparked(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.parked()
        tenant.send(Want())
        await tenant.expect(Region)
        tenant.kill()
        await home.no_lease()
        with pytest.raises(PreconditionFailed) as refused:
            await unparked(home.landlord)
        assert refused.value.reason == "NO_TENANT"


async def test_policy_always_keeps_what_a_person_brought_back_until_it_is_idle(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, policy="always") as home:
        tenant = await home.filled()
        await tenant.vacate()
        await home.until("PARKED")
        unparking = asyncio.create_task(unparked(home.landlord))
        await tenant.come_back()
        assert (await unparking)[-1].state == "RESIDENT"
        tenant.send(Idle())
        await tenant.vacate()
        assert (await home.until("PARKED")).generation == 4


async def test_an_unpark_out_of_memory_leaves_the_region_parked_and_works_later(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, units=8) as home:
        tenant = await home.parked()
        ballast = home.physical.create(6 * UNIT)
        with pytest.raises(Busy) as refused:
            await unparked(home.landlord)
        assert refused.value.reason == "NO_ROOM"
        assert refused.value.metadata["limit_bytes"] == str(2 * UNIT)
        assert home.landlord.regions()[0].state == "PARKED"
        assert home.landlord.regions()[0].generation == 2
        tenant.send(Want())
        said = await tenant.expect(Refused)
        assert (said.reason, said.retry_after_s) == ("NO_ROOM", 1.0)
        ballast.close()
        tenant.send(Want())  # as it does after that time
        assert await tenant.come_back() == 3


async def test_a_driver_that_refuses_the_memory_is_no_room(tmp_path: Path) -> None:
    async with house(tmp_path, budget_bytes=1 << 40) as home:
        tenant = await home.parked()
        ballast = home.physical.create(14 * UNIT)
        with pytest.raises(Busy, match="NO_ROOM|free|needed"):
            await unparked(home.landlord)
        ballast.close()
        assert home.landlord.regions()[0].state == "PARKED"
        tenant.send(Want())
        await tenant.come_back()


async def test_a_tenant_that_never_answers_loses_its_lease_and_the_bytes_are_counted(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        tenant.let_go()  # it holds nothing, yet says nothing
        report = await home.landlord.park(NAME, timeout_s=0.02)
        assert report.freed_bytes == 4 * UNIT
        assert report.info.state == "PARKED" and report.info.lease_pid == 0
        assert await tenant.closed()


async def test_a_tenant_that_keeps_the_memory_makes_the_park_short(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        tenant.map_region(tenant.fds[0])
        with pytest.raises(Aborted) as short:
            await home.landlord.park(NAME, timeout_s=0.02)
        assert short.value.reason == "PARK_SHORT"
        assert short.value.metadata == {"freed": "0", "needed": str(4 * UNIT)}
        info = home.landlord.regions()[0]
        assert (info.state, info.generation, info.lease_pid) == ("FAILED", 2, 0)


async def test_a_short_park_is_made_good_once_the_bytes_come_free(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        with pytest.raises(Aborted):
            await home.landlord.park(NAME, timeout_s=0.02)
        with pytest.raises(Aborted):
            await home.landlord.park(NAME)
        tenant.kill()
        report = await home.landlord.park(NAME)
        assert report.freed_bytes == 4 * UNIT and report.info.state == "PARKED"


async def test_a_failed_region_serves_its_next_tenant(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await home.filled()
        with pytest.raises(Aborted):
            await home.landlord.park(NAME, timeout_s=0.02)
        successor = await home.tenant()
        successor.send(hello())
        assert await successor.expect(Parked) == Parked(2, TENSORS)
        successor.send(Want())
        assert await successor.come_back() == 3
        assert (await home.until("RESIDENT")).lease_pid == os.getpid()


async def test_unmapped_before_the_memory_is_let_go_makes_the_park_short(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.expect(Quiesce)
        tenant.send(Unmapped(1, 0))
        with pytest.raises(Aborted):
            await parking


async def test_a_caller_that_leaves_does_not_stop_the_park(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.expect(Quiesce)
        parking.cancel()
        tenant.let_go()
        tenant.send(Unmapped(1, 0))
        assert (await home.until("PARKED")).generation == 2


async def test_a_watcher_sees_every_state_of_a_park_and_an_unpark(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        seen: list[tuple[str, int]] = []

        async def watch() -> None:
            async for info in home.landlord.watch(NAME):
                if not seen or seen[-1] != (info.state, info.generation):
                    seen.append((info.state, info.generation))
                if info.generation == 3 and info.state == "RESIDENT":
                    return

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0)
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.vacate()
        await parking
        tenant.send(Want())
        await tenant.come_back()
        await asyncio.wait_for(watching, TIMEOUT_S)
        steps = ["RESIDENT", "PARKING", "PARKED", "UNPARKING", "RESIDENT"]
        assert seen == list(zip(steps, (1, 1, 2, 3, 3), strict=True))


async def test_an_unknown_drafter_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await home.filled()
        with pytest.raises(NotFound) as unknown:
            await home.landlord.park("another")
        assert unknown.value.metadata == {"got": "another", "allowed": NAME}


async def test_a_thousand_cycles_leave_no_descriptor_and_no_byte(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled(hello(units=1))
        await cycles(home, tenant, 10)
        before = len(open_descriptors())
        used = home.physical.used_bytes()
        await cycles(home, tenant, 1_000)
        assert len(open_descriptors()) <= before
        assert home.physical.used_bytes() == used == UNIT


async def cycles(home, tenant, count: int) -> None:
    for _ in range(count):
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.vacate()
        assert (await parking).freed_bytes == UNIT
        tenant.send(Want())
        await tenant.come_back(UNIT)
        tenant.let_go()
        await home.until("RESIDENT")
