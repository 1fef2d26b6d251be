"""`skim memory` against a target whose GPU is a fake one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skim.cli.memory import run_park, run_regions, run_unpark, run_watch
from skim.cli.output import Output, describe
from skim.errors import NotFound, SkimError, Unavailable, Unimplemented
from tests.fixtures.target import RunningTarget, running_target
from tests.fixtures.tenant import TIMEOUT_S, UNIT
from tests.service.test_target_memory import attached, shared_gpu

NAME = "skim-drafter"


def address(running: RunningTarget) -> str:
    return f"127.0.0.1:{running.server.admin_port}"


async def run(command: Callable[..., int], *arguments: Any) -> int:
    """Run a blocking command beside the service that answers it."""
    return await asyncio.wait_for(
        asyncio.to_thread(command, Output(as_json=True), *arguments), TIMEOUT_S
    )


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]


async def test_people_list_park_and_unpark_from_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with shared_gpu(tmp_path, units=256) as running:
        assert await run(run_regions, address(running)) == 0
        assert printed(capsys)[-1] == {"regions": []}
        async with attached(running) as tenant:
            parking = asyncio.create_task(run(run_park, address(running), NAME, 1, 60.0))
            await tenant.vacate(workspace_bytes=9)
            assert await parking == 0
            parked = printed(capsys)[-1]
            assert parked["freed_bytes"] == 4 * UNIT and parked["workspace_bytes"] == 9
            assert (parked["region"]["state"], parked["region"]["generation"]) == ("PARKED", 2)
            await run(run_park, address(running), NAME, 0, None)
            assert printed(capsys)[-1]["already_parked"] is True

            unparking = asyncio.create_task(run(run_unpark, address(running), NAME, 2))
            await tenant.come_back()
            assert await unparking == 0
            assert printed(capsys)[-1]["region"]["state"] == "RESIDENT"
            assert await run(run_regions, address(running)) == 0
            (region,) = printed(capsys)[-1]["regions"]
            assert (region["name"], region["generation"]) == (NAME, 3)


async def test_a_watch_ends_with_its_region(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with shared_gpu(tmp_path, units=256) as running, attached(running) as tenant:
        watching = asyncio.create_task(run(run_watch, address(running), NAME))
        assert running.target.landlord is not None
        while not printed(capsys):  # then it watches
            await asyncio.sleep(0.005)
        parking = asyncio.create_task(running.target.landlord.park(NAME))
        await tenant.vacate()
        await parking
        await running.target.landlord.close()
        assert await watching == 0
        assert [line["state"] for line in printed(capsys)][:2] == ["PARKING", "PARKED"]


async def test_what_goes_wrong_is_said_with_what_to_do(tmp_path: Path) -> None:
    async with shared_gpu(tmp_path, units=256) as running:
        for command in (run_unpark, run_watch):
            arguments = (address(running), "other", 0)[: 3 if command is run_unpark else 2]
            with pytest.raises(NotFound) as unknown:
                await run(command, *arguments)
            assert "skim memory list" in describe(unknown.value)


async def test_a_target_without_a_memory_plane_says_how_to_get_one() -> None:
    async with running_target() as running:
        with pytest.raises(Unimplemented) as refused:
            await run(run_regions, address(running))
        assert "memory_socket" in describe(refused.value)


async def test_nobody_at_the_address_is_named() -> None:
    with pytest.raises(Unavailable) as gone:
        await run(run_regions, "127.0.0.1:1")
    assert isinstance(gone.value, SkimError) and "127.0.0.1:1" in gone.value.message
