"""A request whose drafter is killed while its weights move is answered by a full prefill.

Gateway and target run here (the engine is a child), the drafter service is a process of its own on
a gated device. All memory is fake, and with -m gpu a GPU's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.peer import Peer
from gateway.__main__ import Gateway
from gateway.config import GatewaySettings
from kernels.ipc.fake_physical import FakePhysical
from kernels.ipc.physical import open_physical
from skim.cli.ports import free_ports
from skim.client import AsyncClient
from target_svc.memory.landlord import Landlord
from tests.fixtures.cuda_backend import model
from tests.fixtures.target import RunningTarget, running_target
from tests.ipc.forked import ForkedPeer
from tests.tools import require_gpu, require_tool

WAIT_S = 60.0
NAME = "mini"
TOTAL_BYTES = 1 << 30
PROMPT = b"a needle in much hay. " * 30
OPTIONS: dict[str, Any] = {"max_tokens": 2, "mode": "skim"}


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def kind(request: pytest.FixtureRequest) -> str:
    require_gpu() if request.param == "gpu" else require_tool("g++")
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model"), layers=2)


@dataclass
class System:
    """The running services, and what a test needs of them."""

    target: RunningTarget
    gateway: Gateway
    client: AsyncClient
    socket: Path
    path: Path
    port: int
    kind: str

    @property
    def landlord(self) -> Landlord:
        assert self.target.target.landlord is not None
        return self.target.target.landlord

    @property
    def region(self) -> Any:
        (found,) = self.landlord.regions()
        return found

    async def until(self, *states: str) -> None:
        """Wait until the region is in one of the states."""
        async with asyncio.timeout(WAIT_S):
            async for info in self.landlord.watch(NAME):
                if info.state in states:
                    return

    async def new_drafter(self) -> Peer:
        """Start a drafter; ready when the gateway has seen that it serves."""
        given = (str(self.socket), str(self.path), NAME, str(self.port), self.kind)
        drafter = ForkedPeer("tests.fixtures.drafter_process", *given)
        async with asyncio.timeout(WAIT_S):
            await self.gateway.peers.drafters[NAME].until(True)
        return drafter


@asynccontextmanager
async def system(folder: Path, path: Path, kind: str) -> AsyncIterator[System]:
    """A gateway in front of a target with a landlord, and of a drafter that is not started yet."""
    socket, (port,) = folder / "s", free_ports(1)
    physical = open_physical() if kind == "gpu" else FakePhysical(TOTAL_BYTES, folder=folder)
    async with running_target(physical=physical, memory_socket=socket, kept_max=2_048) as target:
        settings = GatewaySettings(
            listen="127.0.0.1:0",
            admin_listen="127.0.0.1:0",
            target=f"127.0.0.1:{target.server.port}",
            drafters=f"{NAME}=127.0.0.1:{port}",
            skim_min_tokens=10,
            score_timeout_s=WAIT_S,
        )
        gateway = Gateway(settings)
        await gateway.start()
        try:
            await gateway.peers.target.until(True)
            async with AsyncClient(f"127.0.0.1:{gateway.server.port}", deadline_s=WAIT_S) as client:
                yield System(target, gateway, client, socket, path, port, kind)
        finally:
            await gateway.close()


async def stopped(drafter: Peer) -> None:
    await asyncio.to_thread(drafter.event, "stopped", WAIT_S)


async def shut(drafter: Peer, gate: str) -> None:
    await asyncio.to_thread(drafter.call, "shut", gate=gate)


async def check_recovery(house: System) -> None:
    """A successor finds the weights, is given memory for them, and skims."""
    with await house.new_drafter():
        again = await house.client.generate(PROMPT, **OPTIONS)
        assert again.plan.skimmed
        assert house.region.state == "RESIDENT"


async def test_drafter_killed_while_its_weights_come_back(
    folder: Path, path: Path, kind: str
) -> None:
    async with system(folder, path, kind) as house:
        with await house.new_drafter() as drafter:
            await house.landlord.park(NAME)
            await shut(drafter, "copy")
            asking = asyncio.create_task(house.client.generate(PROMPT, **OPTIONS))
            await stopped(drafter)
            assert house.region.state == "UNPARKING"
            drafter.kill()
            answer = await asyncio.wait_for(asking, WAIT_S)
        assert not answer.plan.skimmed and answer.plan.full_reason == "drafter_failed"
        assert answer.finish.usage.completion_tokens == 2
        await house.until("RESIDENT")  # half full, for the successor
        await check_recovery(house)


async def test_drafter_killed_while_its_memory_is_asked_back(
    folder: Path, path: Path, kind: str
) -> None:
    async with system(folder, path, kind) as house:
        with await house.new_drafter() as drafter:
            await shut(drafter, "launch")
            asking = asyncio.create_task(house.client.generate(PROMPT, **OPTIONS))
            await stopped(drafter)
            parking = asyncio.create_task(house.landlord.park(NAME))
            await house.until("PARKING")
            drafter.kill()
            answer = await asyncio.wait_for(asking, WAIT_S)
            report = await asyncio.wait_for(parking, WAIT_S)
        assert not answer.plan.skimmed and answer.plan.full_reason == "drafter_failed"
        assert report.freed_bytes == house.region.size_bytes
        await check_recovery(house)
