"""The landlord over a driver that is slow or fails."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from kernels.errors import HandleError, NoDevice
from kernels.ipc.fake_physical import FakePhysical, FakeRegion
from kernels.ipc.messages import Fill, Parked, Refused, Region, Want
from skim.errors import Aborted, EngineFault
from tests.fixtures.tenant import NAME, TIMEOUT_S, UNIT, hello, house


class Driver(FakePhysical):
    """A fake GPU whose calls can be made to wait, or to fail."""

    def __init__(self, units: int) -> None:
        super().__init__(units * UNIT)
        self.go_on = threading.Event()
        self.go_on.set()
        self.called = threading.Event()
        self.fails_in = ""

    def used_bytes(self) -> int:
        if self.fails_in == "count":
            raise NoDevice("nvml", "the driver is unwell")
        return super().used_bytes()

    def create(self, size_bytes: int) -> Any:
        self.called.set()
        assert self.go_on.wait(TIMEOUT_S)
        if self.fails_in == "create":
            raise HandleError("create", "the driver is unwell")
        region = super().create(size_bytes)
        return _Region(region, self)


class _Region:
    def __init__(self, region: FakeRegion, driver: Driver) -> None:
        self._region, self._driver = region, driver
        self.size_bytes = region.size_bytes

    def export(self) -> int:
        if self._driver.fails_in == "export":
            raise HandleError("export", "the driver is unwell")
        return self._region.export()

    def close(self) -> None:
        self._region.close()
        if self._driver.fails_in == "close":
            raise HandleError("release", "the driver is unwell")


async def test_a_tenant_that_dies_while_its_memory_is_made_leaves_no_byte(tmp_path: Path) -> None:
    driver = Driver(16)
    async with house(tmp_path, physical=driver) as home:
        tenant = await home.parked()
        driver.called.clear()
        driver.go_on.clear()
        tenant.send(Want())
        assert await asyncio.to_thread(driver.called.wait, TIMEOUT_S)
        tenant.kill()
        async with asyncio.timeout(TIMEOUT_S):
            async for info in home.landlord.watch(NAME):
                if not info.lease_pid:
                    break
        driver.go_on.set()
        successor = await home.tenant()
        successor.send(hello())
        assert (await successor.expect(Parked)).generation == 2
        assert home.physical.used_bytes() == 0


async def test_the_loop_goes_on_while_the_driver_works(tmp_path: Path) -> None:
    driver = Driver(16)
    async with house(tmp_path, physical=driver) as home:
        driver.go_on.clear()
        tenant = await home.tenant()
        tenant.send(hello())
        assert await asyncio.to_thread(driver.called.wait, TIMEOUT_S)
        assert home.landlord.regions()[0].state == "UNPARKING"
        driver.go_on.set()
        await tenant.expect(Fill)


@pytest.mark.parametrize("call", ["create", "export"])
async def test_a_driver_that_fails_is_told_as_no_room_and_tried_again(
    tmp_path: Path, call: str
) -> None:
    driver = Driver(16)
    async with house(tmp_path, physical=driver) as home:
        tenant = await home.parked()
        driver.fails_in = call
        with pytest.raises(EngineFault, match="unwell"):
            async for _ in home.landlord.unpark(NAME):
                pass
        assert home.landlord.regions()[0].state == "PARKED"
        assert home.physical.used_bytes() == 0
        tenant.send(Want())
        assert (await tenant.expect(Refused)).reason == "NO_ROOM"
        driver.fails_in = ""
        tenant.send(Want())
        assert (await tenant.expect(Region)).generation == 3


@pytest.mark.parametrize("call", ["create", "export"])
async def test_a_driver_that_fails_at_the_first_fill_leaves_nothing(
    tmp_path: Path, call: str
) -> None:
    driver = Driver(16)
    driver.fails_in = call
    async with house(tmp_path, physical=driver) as home:
        tenant = await home.tenant()
        tenant.send(hello())
        assert (await tenant.expect(Refused)).reason == "NO_ROOM"
        assert not home.landlord.regions() and home.physical.used_bytes() == 0
        driver.fails_in = ""
        await tenant.fill()


@pytest.mark.parametrize("failing", ["close", "count"])
async def test_a_release_that_fails_is_a_short_park(tmp_path: Path, failing: str) -> None:
    driver = Driver(16)
    async with house(tmp_path, physical=driver) as home:
        tenant = await home.filled()
        driver.fails_in = failing
        parking = asyncio.create_task(home.landlord.park(NAME))
        await tenant.vacate()
        with pytest.raises(Aborted) as short:
            await parking
        assert short.value.metadata == {"freed": "0", "needed": str(4 * UNIT)}
        driver.fails_in = ""
