"""A whole target with a memory plane: full contexts park the drafter, people park over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kernels.ipc.fake_physical import FakePhysical
from kernels.ipc.messages import Copied, Quiesce, Region, State, Unmapped
from skim.errors import (
    Aborted,
    Busy,
    ConfigError,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    Unimplemented,
)
from skim.rpc import connect
from skim.rpc_errors import errors_from_peer
from skim.v1 import drafter_pb2, memory_pb2, memory_pb2_grpc
from target_svc import target as target_module
from target_svc.config import TargetSettings
from target_svc.target import Target, TargetModel
from tests.fixtures.engine import tiny_model
from tests.fixtures.target import RunningTarget, ask, config, full, running_target
from tests.fixtures.tenant import UNIT, Tenant

NAME = "skim-drafter"
KEPT_MAX = 512
PROMPT = "the quick brown fox jumps over it " * 200  # more tokens than a slot takes


@asynccontextmanager
async def shared_gpu(folder: Path, *, units: int, **settings: Any) -> AsyncIterator[RunningTarget]:
    """A target on the CPU whose contexts ask a fake GPU of `units` × 2 MiB for their bytes."""
    path = folder / "memory.sock"
    values = {"memory_socket": path, "full_max_tokens": 8_192, "kept_max": KEPT_MAX, **settings}
    async with running_target(physical=FakePhysical(units * UNIT), **values) as running:
        yield running


@asynccontextmanager
async def memory_service(running: RunningTarget) -> AsyncIterator[Any]:
    channel = connect(f"127.0.0.1:{running.server.admin_port}")
    try:
        async with errors_from_peer():
            yield memory_pb2_grpc.MemoryServiceStub(channel)
    finally:
        await channel.close()


@asynccontextmanager
async def attached(running: RunningTarget) -> AsyncIterator[Tenant]:
    assert running.target.settings.memory_socket is not None
    tenant = await Tenant.connect(running.target.settings.memory_socket)
    try:
        await tenant.fill()
        yield tenant
    finally:
        tenant.kill()


async def expect(tenant: Tenant, kind: type[Any]) -> Any:
    """The next message that is not STATE."""
    while True:
        message = await tenant.receive()
        if not isinstance(message, State):
            assert isinstance(message, kind), message
            return message


async def test_a_full_prefill_parks_the_drafter_and_gives_the_memory_back(tmp_path: Path) -> None:
    # 128 MiB of reserve and a few of cells: with the drafter's 8 MiB the context does not fit.
    async with shared_gpu(tmp_path, units=69) as running, attached(running) as tenant:
        answering = asyncio.create_task(ask(running, PROMPT, full(), config(max_tokens=4)))
        quiesce = await expect(tenant, Quiesce)
        tenant.let_go()
        tenant.send(Unmapped(quiesce.generation, 0))
        answer = await answering
        assert answer.started is not None and answer.started.kept_tokens > KEPT_MAX
        assert answer.started.park_s > 0.0 and answer.started.queue_s >= 0.0
        assert answer.finish is not None
        region = await expect(tenant, Region)
        assert (region.generation, region.loaded) == (3, False)
        tenant.send(Copied(3, 4 * UNIT, 2, done=True))


async def test_tenants_hear_that_sequences_decode_and_that_they_stopped(tmp_path: Path) -> None:
    async with shared_gpu(tmp_path, units=256) as running, attached(running) as tenant:
        await ask(running, "short", full(), config(max_tokens=32, ignore_eos=True))
        assert (await tenant.expect(State)).decoding is True
        assert (await tenant.expect(State)).decoding is False


async def test_a_context_that_no_park_makes_room_for_is_impossible_with_limit_and_got(
    tmp_path: Path,
) -> None:
    async with (
        shared_gpu(tmp_path, units=67, park_timeout_s=0.02) as running,
        attached(running),
    ):  # never lets go
        with pytest.raises(Busy) as refused:
            await ask(running, PROMPT, full(), config(max_tokens=4))
        assert refused.value.reason == "FULL_PREFILL_IMPOSSIBLE"
        assert refused.value.metadata["limit"] == str(KEPT_MAX)
        assert int(refused.value.metadata["got"]) > KEPT_MAX


async def test_where_full_gets_no_room_the_fallback_answers_degraded(tmp_path: Path) -> None:
    async with (
        shared_gpu(tmp_path, units=69, park_policy="never") as running,
        attached(running),
    ):
        answer = await ask(running, PROMPT, full(PROMPT.encode(), (0, 64)), config(max_tokens=4))
        assert answer.started is not None and answer.started.degraded
        assert answer.started.kept_tokens < KEPT_MAX


async def test_a_plan_that_fits_the_working_context_parks_nobody(tmp_path: Path) -> None:
    async with shared_gpu(tmp_path, units=69) as running, attached(running):
        answer = await ask(running, "short", full(), config(max_tokens=4))
        assert answer.started is not None and answer.started.park_s == 0.0
        assert running.target.landlord is not None
        assert running.target.landlord.regions()[0].generation == 1


async def test_people_list_park_and_unpark_a_region(tmp_path: Path) -> None:
    async with (
        shared_gpu(tmp_path, units=256) as running,
        memory_service(running) as service,
        attached(running) as tenant,
    ):
        (region,) = (await service.ListRegions(memory_pb2.ListRegionsRequest())).regions
        assert (region.name, region.generation, region.size_bytes) == (NAME, 1, 4 * UNIT)
        assert region.state == drafter_pb2.RESIDENCY_STATE_RESIDENT
        assert region.transport == "vmm_fd" and region.device_uuid.startswith("GPU-")

        async def park(**fields: Any) -> memory_pb2.ParkResponse:
            return await service.Park(memory_pb2.ParkRequest(name=NAME, **fields))

        parking = asyncio.create_task(park(expect_generation=1, timeout_s=60.0))
        await tenant.vacate(workspace_bytes=9)
        parked = await parking
        assert (parked.freed_bytes, parked.workspace_bytes) == (4 * UNIT, 9)
        assert not parked.already_parked and parked.park_s > 0.0
        assert parked.region.state == drafter_pb2.RESIDENCY_STATE_PARKED
        assert (await park(expect_generation=1)).already_parked

        coming = asyncio.create_task(tenant.come_back())
        request = memory_pb2.UnparkRequest(name=NAME, expect_generation=2)
        steps = [step async for step in service.Unpark(request)]
        await coming
        assert [step.region.generation for step in steps] == [3] * len(steps)
        assert steps[-1].region.state == drafter_pb2.RESIDENCY_STATE_RESIDENT
        assert (steps[-1].copied_bytes, steps[-1].layers_ready) == (4 * UNIT, 2)


async def test_people_watch_a_region_s_states_without_the_copy_s_progress(tmp_path: Path) -> None:
    async with (
        shared_gpu(tmp_path, units=256) as running,
        memory_service(running) as service,
        attached(running) as tenant,
    ):
        call = service.WatchState(memory_pb2.WatchStateRequest(name=NAME))
        assert (await call.read()).region.state == drafter_pb2.RESIDENCY_STATE_RESIDENT
        assert running.target.landlord is not None
        parking = asyncio.create_task(running.target.landlord.park(NAME))
        await tenant.vacate()
        await parking
        assert (await call.read()).region.state == drafter_pb2.RESIDENCY_STATE_PARKING
        assert (await call.read()).region.state == drafter_pb2.RESIDENCY_STATE_PARKED
        call.cancel()


async def test_what_a_park_refuses_reaches_its_caller(tmp_path: Path) -> None:
    request = memory_pb2.ParkRequest
    async with shared_gpu(tmp_path, units=256) as running, attached(running):
        # One by one, on one target: the last one, whose tenant lets nothing go, moves the region.
        for refused, error, reason in (
            (request(name="other"), NotFound, "REGION_NOT_FOUND"),
            (request(name=NAME, timeout_s=0.0), InvalidRequest, "INVALID_ARGUMENT"),
            (request(name=NAME, timeout_s=61.0), InvalidRequest, "INVALID_ARGUMENT"),
            (request(name=NAME, expect_generation=7), PreconditionFailed, "GENERATION_MISMATCH"),
            (request(name=NAME, timeout_s=0.02), Aborted, "PARK_SHORT"),
        ):
            with pytest.raises(error) as raised:
                async with memory_service(running) as service:
                    await service.Park(refused)
            assert raised.value.reason == reason


async def test_an_unknown_region_cannot_be_watched_or_unparked(tmp_path: Path) -> None:
    async with shared_gpu(tmp_path, units=256) as running:
        for ask_for in (
            lambda service: service.WatchState(memory_pb2.WatchStateRequest(name="other")),
            lambda service: service.Unpark(memory_pb2.UnparkRequest(name="other")),
        ):
            with pytest.raises(NotFound):
                async with memory_service(running) as service:
                    await ask_for(service).read()


async def test_without_a_memory_socket_there_is_no_memory_plane() -> None:
    async with running_target() as running:
        with pytest.raises(Unimplemented, match="memory_socket") as refused:
            async with memory_service(running) as service:
                await service.ListRegions(memory_pb2.ListRegionsRequest())
        assert refused.value.reason == "NO_MEMORY_PLANE"


async def test_a_memory_plane_without_a_gpu_is_a_setting_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = TargetSettings(model=tiny_model(), memory_socket=tmp_path / "memory.sock")
    with pytest.raises(ConfigError):
        Target(settings, TargetModel(settings.model))


@pytest.mark.parametrize("transport", ["vmm_fd", "legacy_ipc"])
def test_the_chosen_transport_is_how_the_gpu_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    opened: list[tuple[int, str]] = []

    def open_physical(ordinal: int, transport: str) -> FakePhysical:
        opened.append((ordinal, transport))
        return FakePhysical(UNIT)

    monkeypatch.setattr(target_module, "open_physical", open_physical)
    values: dict[str, Any] = {"memory_transport": transport}
    settings = TargetSettings(model=tiny_model(), memory_socket=tmp_path / "s", **values)
    Target(settings, TargetModel(settings.model))
    assert opened == [(0, transport)]


async def test_two_targets_cannot_share_one_socket(tmp_path: Path) -> None:
    async with shared_gpu(tmp_path, units=256) as running:
        second = Target(running.target.settings, running.target.model, physical=FakePhysical(UNIT))
        with pytest.raises(ConfigError, match="another landlord"):
            await second.start()
        await second.close()


def test_grpc_knows_the_code_of_a_short_park() -> None:
    from skim.rpc_errors import status_code

    assert status_code(Aborted("short")) is grpc.StatusCode.ABORTED
