"""kill -9 of the target's engine child: the service keeps every region, its tenant the memory."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

from bench.peer import Peer
from kernels.ipc.fake_physical import FakePhysical
from target_svc.memory.landlord import Landlord
from tests.fixtures.cuda_backend import model
from tests.fixtures.target import ask, running_target
from tests.ipc.forked import ForkedPeer
from tests.tools import require_tool

WAIT_S = 30.0
NAME = "drafter"
TOTAL_BYTES = 512 << 20


async def call(tenant: Peer, do: str) -> Any:
    return await asyncio.wait_for(asyncio.wrap_future(tenant.start(do)), WAIT_S)


def region(landlord: Landlord) -> dict[str, Any]:
    (found,) = landlord.regions()
    return dataclasses.asdict(found)


async def test_killed_engine_loses_no_region(folder: Path) -> None:
    require_tool("g++")
    path = model(folder)
    physical = FakePhysical(TOTAL_BYTES, folder=folder)
    async with running_target(physical=physical, memory_socket=folder / "s") as running:
        landlord = running.target.landlord
        assert landlord is not None and running.target.engine.pid is not None
        with ForkedPeer(
            "tests.fixtures.tenant_process", str(folder / "s"), str(path), NAME
        ) as tenant:
            await call(tenant, "take")
            content, before = await call(tenant, "content"), region(landlord)
            engine = running.target.engine.pid
            os.kill(engine, signal.SIGKILL)
            async with asyncio.timeout(WAIT_S):
                while running.target.engine.pid in (engine, None):
                    await asyncio.sleep(0.01)
                await running.target.engine.ready()
            assert (await ask(running, "the quick brown fox")).finish is not None
            assert region(landlord) == before
            assert physical.used_bytes() == before["size_bytes"]
            assert await call(tenant, "content") == content
            assert (await call(tenant, "state"))["file_reads"] == 1
