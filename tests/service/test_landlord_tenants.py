"""Tenants at the landlord's socket: they attach, swap, and die in each state."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.ipc.messages import (
    Copied,
    Fill,
    Parked,
    Quiesce,
    Refused,
    Region,
    Want,
)
from skim.errors import DeadlineExceeded
from target_svc.memory import lease as lease_module
from tests.fixtures.tenant import NAME, TENSORS, TIMEOUT_S, UNIT, hello, house

# Attach.


async def test_an_unknown_model_is_filled_checked_and_listed(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await home.filled()
        (info,) = home.landlord.regions()
        assert (info.name, info.state, info.generation) == (NAME, "RESIDENT", 1)
        assert (info.size_bytes, info.lease_pid) == (4 * UNIT, os.getpid())
        assert (info.device_uuid, info.transport) == (home.physical.uuid, "vmm_fd")
        assert (info.model_digest, info.layout_digest) == (
            hello().model_digest,
            hello().layout_digest,
        )


async def test_a_filled_image_cannot_be_written_any_more(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        with pytest.raises(PermissionError):
            os.pwrite(tenant.fds[1], b"x", 0)


async def test_a_successor_attaches_to_weights_that_are_resident(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        first = await home.filled()
        written = os.pread(first.fds[1], 64, 0)
        first.kill()
        await home.no_lease()
        assert home.physical.used_bytes() == 4 * UNIT
        successor = await home.tenant()
        assert await successor.attach() == Region(1, loaded=True, tensors=TENSORS)
        assert os.pread(successor.fds[1], 64, 0) == written
        assert home.states == {NAME: "RESIDENT"}


async def test_a_second_tenant_of_a_region_is_told_to_come_later(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        first = await home.filled()
        second = await home.tenant()
        second.send(hello())
        refused = await second.expect(Refused)
        assert refused.reason == "REGION_BUSY" and refused.retry_after_s
        first.kill()
        await home.no_lease()
        assert (await second.attach()).loaded


async def test_another_layout_is_another_region(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await home.filled()
        await home.filled(replace(hello("other"), model_digest=hello().model_digest))
        assert home.states == {NAME: "RESIDENT", "other": "RESIDENT"}


async def test_a_model_changed_under_its_name_replaces_the_one_nobody_holds(tmp_path: Path) -> None:
    async with house(tmp_path, units=4) as home:
        first = await home.filled()
        changed = replace(hello(), model_digest="ab" * 32)
        second = await home.tenant()
        second.send(changed)
        assert (await second.expect(Refused)).reason == "REGION_BUSY"
        first.kill()
        await home.no_lease()
        second.send(changed)
        await second.expect(Fill)
        assert len(home.landlord.regions()) == 1


async def test_a_drafter_on_another_gpu_is_refused_for_good(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        tenant.send(hello(gpu_uuid="GPU-another"))
        refused = await tenant.expect(Refused)
        assert (refused.reason, refused.retry_after_s) == ("GPU_MISMATCH", None)
        assert home.physical.uuid in refused.message and "GPU-another" in refused.message
        assert await tenant.closed()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": 2}, "BAD_MESSAGE"),
        ({"size_bytes": UNIT + 1}, "BAD_MESSAGE"),
        ({"size_bytes": 0}, "BAD_MESSAGE"),
        ({"size_bytes": 17 * UNIT}, "NO_ROOM"),
    ],
)
async def test_a_hello_that_cannot_be_is_refused_for_good(
    tmp_path: Path, change: dict[str, int], reason: str
) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        tenant.send(hello(**change))
        refused = await tenant.expect(Refused)
        assert (refused.reason, refused.retry_after_s) == (reason, None)
        assert await tenant.closed() and not home.landlord.regions()


async def test_a_known_layout_of_another_size_is_refused(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        (await home.filled()).kill()
        await home.no_lease()
        tenant = await home.tenant()
        tenant.send(hello(units=5))
        assert (await tenant.expect(Refused)).reason == "BAD_MESSAGE"


async def test_an_unknown_model_without_room_waits_and_asks_again(tmp_path: Path) -> None:
    async with house(tmp_path, units=8) as home:
        ballast = home.physical.create(6 * UNIT)
        tenant = await home.tenant()
        tenant.send(hello())
        refused = await tenant.expect(Refused)
        assert (refused.reason, refused.retry_after_s) == ("NO_ROOM", 1.0)
        assert not home.landlord.regions()
        ballast.close()
        await tenant.fill()
        assert home.states == {NAME: "RESIDENT"}


async def test_a_parked_region_comes_back_for_its_successor(tmp_path: Path) -> None:
    async with house(tmp_path, policy="auto") as home:
        first = await home.filled()
        first.send(hello("other"))  # a swap parks the first one
        first.let_go()
        await first.expect(Fill)
        second = await home.tenant()
        assert await second.attach() == Region(3, loaded=False, tensors=TENSORS)
        assert len(second.fds) == 2


async def test_a_parked_region_that_does_not_fit_answers_parked_with_its_image(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, units=6) as home:
        first = await home.filled()
        first.let_go()
        first.send(hello("other"))
        await first.expect(Fill)
        second = await home.tenant()
        second.send(hello())
        assert await second.expect(Parked) == Parked(2, TENSORS)
        assert len(second.fds) == 1
        second.send(Want())
        assert (await second.expect(Refused)).reason == "NO_ROOM"
        first.kill()  # the fill is given up, and its bytes are free
        while isinstance(answer := await second.receive(), Refused):
            second.send(Want())  # the landlord looked before it knew
        assert answer == Region(3, loaded=False, tensors=None)


async def test_a_region_that_nobody_holds_gives_way_to_one_that_is_wanted(tmp_path: Path) -> None:
    async with house(tmp_path, units=6) as home:
        (await home.filled()).kill()
        await home.no_lease()
        await home.filled(hello("other"))
        assert home.states == {NAME: "PARKED", "other": "RESIDENT"}


# Swap.


async def test_a_swap_frees_the_old_region_before_the_new_one_is_made(tmp_path: Path) -> None:
    async with house(tmp_path, units=6) as home:  # both do not fit
        tenant = await home.filled()
        tenant.let_go()
        await tenant.fill(hello("other"))
        assert home.states == {NAME: "PARKED", "other": "RESIDENT"}
        tenant.let_go()
        back = await tenant.attach()
        assert back == Region(3, loaded=False, tensors=TENSORS)


async def test_a_swap_while_parking_ends_the_park(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.expect(Quiesce)
        tenant.let_go()
        await tenant.fill(hello("other"))
        assert (await parking).freed_bytes == 4 * UNIT
        assert home.states == {NAME: "PARKED", "other": "RESIDENT"}


async def test_hello_again_for_the_same_region_keeps_it_loaded(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        tenant.let_go()
        assert await tenant.attach() == Region(1, loaded=True, tensors=TENSORS)
        assert home.physical.used_bytes() == 4 * UNIT


# Deaths.


async def test_a_tenant_killed_while_filling_leaves_nothing(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        tenant.send(hello())
        await tenant.expect(Fill)
        tenant.kill()
        await home.no_region()
        await home.filled()


async def test_a_tenant_killed_while_parking_has_let_go(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        parking = asyncio.create_task(home.landlord.park(NAME, timeout_s=60.0))
        await tenant.expect(Quiesce)
        tenant.kill()
        report = await asyncio.wait_for(parking, TIMEOUT_S)
        assert (report.freed_bytes, report.info.lease_pid) == (4 * UNIT, 0)


async def test_a_tenant_killed_while_unparking_leaves_the_copy_to_its_successor(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as home:
        tenant = await home.parked()
        tenant.send(Want())
        await tenant.expect(Region)
        tenant.send(Copied(3, UNIT, 1, done=False))
        tenant.kill()
        assert (await home.no_lease()).state == "RESIDENT"
        successor = await home.tenant()
        assert await successor.attach() == Region(3, loaded=False, tensors=TENSORS)
        assert home.states == {NAME: "UNPARKING"}
        successor.send(Copied(3, 4 * UNIT, 2, done=True))
        assert (await home.until("RESIDENT")).generation == 3


async def test_a_tenant_killed_while_parked_leaves_its_image_to_its_successor(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as home:
        (await home.parked()).kill()
        await home.no_lease()
        successor = await home.tenant()
        successor.send(hello())
        assert await successor.expect(Parked) == Parked(2, TENSORS)


async def test_a_region_that_is_being_filled_cannot_be_parked_in_time(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        tenant.send(hello())
        await tenant.expect(Fill)
        with pytest.raises(DeadlineExceeded):
            await home.landlord.park(NAME, timeout_s=0.02)


async def test_a_tenant_that_never_finishes_its_fill_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "FILL_TIMEOUT_S", 0.02)
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        tenant.send(hello())
        await tenant.expect(Fill)
        tenant.let_go()
        assert await tenant.closed()
        await home.no_region()
