"""The real landlord and a real drafter service in one process, on the fake GPU."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from skim.errors import ConfigError, DeadlineExceeded, ModelFileError, Unavailable
from skim.rpc_errors import errors_from_peer
from skim.v1 import admin_pb2, drafter_pb2
from skim.v1 import common_pb2 as pb
from tests.fixtures.drafter_service import WAIT_S, DrafterService, long_text, until
from tests.fixtures.leased_drafter import HeldDevice, leased_drafter, leased_model
from tests.fixtures.tenant import UNIT, House, house

PROMPT = long_text(8)
State = drafter_pb2
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def region(home: House, name: str) -> Any:
    return next(info for info in home.landlord.regions() if info.name == name)


async def residency(drafter: DrafterService) -> int:
    return (await drafter.describe()).residency


async def swap(drafter: DrafterService, name: str) -> Any:
    async with errors_from_peer():
        return await drafter.admin.SwapDrafter(admin_pb2.SwapDrafterRequest(name=name))


async def test_park_unpark_and_swap(folder: Path) -> None:
    async with house(folder) as home, leased_drafter(home.path) as drafter:
        assert await residency(drafter) == State.RESIDENCY_STATE_RESIDENT
        assert region(home, "one").state == "RESIDENT"
        first = (await drafter.score(PROMPT)).result
        assert first.outcome == drafter_pb2.SELECTION_OUTCOME_KEEP_RATIO
        assert first.memory_s < first.forward_s

        report = await home.landlord.park("one")
        assert report.freed_bytes == region(home, "one").size_bytes
        assert report.workspace_bytes > 0 and home.physical.used_bytes() == 0
        assert await residency(drafter) == State.RESIDENCY_STATE_PARKED
        assert await drafter.health() == SERVING

        answer = await drafter.score(PROMPT)
        assert answer.result.spans == first.spans and answer.result.memory_s > 0.0
        assert [event[0] for event in answer.progress][:2] == [pb.STAGE_MEMORY, pb.STAGE_SCORE]
        assert region(home, "one").state == "RESIDENT"

        await swap(drafter, "two")
        assert (await drafter.score(PROMPT)).result.model == "two"
        await home.until("PARKED", "one")
        assert region(home, "two").state == "RESIDENT"
        assert home.physical.used_bytes() == region(home, "two").size_bytes

        await swap(drafter, "one")
        again = (await drafter.score(PROMPT)).result
        assert (again.spans, again.model) == (first.spans, "one")
        await home.until("PARKED", "two")
    assert home.physical.used_bytes() == 0


async def test_request_behind_a_full_context_waits_and_its_deadline_holds(folder: Path) -> None:
    async with house(folder, units=4, min_resident_s=0.0) as home:
        async with leased_drafter(home.path) as drafter:
            spans = (await drafter.score(PROMPT)).result.spans
            async with home.landlord.room(4 * UNIT):
                assert await residency(drafter) == State.RESIDENCY_STATE_PARKED
                with pytest.raises(DeadlineExceeded):
                    await drafter.score(PROMPT, timeout=0.2)
                await until(lambda: not drafter.host.queue.running)
                waiting = asyncio.create_task(drafter.score(PROMPT))
                await until(lambda: drafter.host.queue.running == 1)
                assert region(home, "one").state == "PARKED"
            answer = await asyncio.wait_for(waiting, WAIT_S)
            assert answer.result.spans == spans and answer.result.memory_s > 0.0


async def test_cancelled_while_it_waits_for_memory_the_request_is_gone(folder: Path) -> None:
    async with house(folder, units=4, min_resident_s=0.0) as home:
        async with leased_drafter(home.path) as drafter, home.landlord.room(4 * UNIT):
            waiting = asyncio.create_task(drafter.score(PROMPT))
            await until(lambda: drafter.host.queue.running == 1)
            waiting.cancel()
            await until(lambda: not drafter.host.queue.running)


async def test_policy_always_keeps_a_drafter_only_while_it_scores(folder: Path) -> None:
    async with house(folder, policy="always") as home, leased_drafter(home.path) as drafter:
        spans = []
        for _ in range(3):
            spans.append((await drafter.score(PROMPT)).result.spans)
            await home.until("PARKED", "one")
            assert home.physical.used_bytes() == 0
        assert spans[0] == spans[1] == spans[2]


async def test_drafter_registers_again_with_a_landlord_that_was_restarted(folder: Path) -> None:
    async with house(folder) as home:
        context = leased_drafter(home.path)
        drafter = await context.__aenter__()
        spans = (await drafter.score(PROMPT)).result.spans
    try:
        with pytest.raises(Unavailable) as caught:
            await drafter.score(PROMPT)
        assert caught.value.reason == "MEMORY_PLANE_LOST"
        async with house(folder) as home:
            assert (await drafter.score(PROMPT)).result.spans == spans
            assert region(home, "one").state == "RESIDENT"
            await context.__aexit__(None, None, None)
    finally:
        await context.__aexit__(None, None, None)


async def test_drafter_hears_whether_the_target_decodes(folder: Path) -> None:
    async with house(folder) as home, leased_drafter(home.path) as drafter:
        plane = drafter.host._plane
        assert plane is not None and not plane.lease.decoding
        home.landlord.set_decoding(True)
        await until(lambda: plane.lease.decoding)
        home.landlord.set_decoding(False)
        await until(lambda: not plane.lease.decoding)


async def test_swap_waits_for_the_running_pass_and_serves_nothing_meanwhile(folder: Path) -> None:
    device = HeldDevice()
    async with house(folder) as home, leased_drafter(home.path, device=device) as drafter:
        device.gate.clear()
        device.launched.clear()
        running = asyncio.create_task(drafter.score(PROMPT))
        assert await asyncio.to_thread(device.launched.wait, WAIT_S)
        swapping = asyncio.create_task(swap(drafter, "two"))
        await drafter.until_not_serving()
        with pytest.raises(Unavailable) as caught:
            await drafter.score(PROMPT)
        assert caught.value.reason == "MODEL_SWAPPING" and not swapping.done()
        device.gate.set()
        assert (await running).result.model == "one"
        assert (await swapping).previous == "one"
        assert await drafter.health() == SERVING


async def test_swap_that_fails_leaves_the_old_model_in_its_place(folder: Path) -> None:
    broken = folder / "two.gguf"
    broken.write_bytes(leased_model("qwen2").read_bytes())
    async with house(folder) as home:
        async with leased_drafter(home.path, models=f"two={broken}") as drafter:
            spans = (await drafter.score(PROMPT)).result.spans
            await drafter.admin.LoadDrafter(admin_pb2.LoadDrafterRequest(name="two"))
            broken.unlink()
            broken.write_bytes(leased_model("qwen2", seed=2).read_bytes())
            with pytest.raises(ModelFileError, match="changed"):
                await swap(drafter, "two")
            assert await drafter.health() == SERVING
            answer = (await drafter.score(PROMPT)).result
            assert (answer.model, answer.spans) == ("one", spans)
            await until(lambda: [info.name for info in home.landlord.regions()] == ["one"])


async def test_service_is_ready_only_when_a_landlord_has_given_it_a_place(folder: Path) -> None:
    async with leased_drafter(folder / "memory.sock", start=False) as drafter:
        starting = asyncio.create_task(drafter.host.start())
        await asyncio.to_thread(drafter.host.settings.describe)  # the loader has begun
        assert await drafter.health() == NOT_SERVING
        with pytest.raises(Unavailable) as caught:
            await drafter.score(PROMPT)
        assert caught.value.reason == "MODEL_LOADING"
        async with house(folder) as home:
            await asyncio.wait_for(starting, WAIT_S)
            assert await drafter.health() == SERVING
            assert region(home, "one").lease_pid > 0


async def test_service_that_waits_for_a_landlord_can_be_closed(folder: Path) -> None:
    async with leased_drafter(folder / "memory.sock", start=False) as drafter:
        starting = asyncio.create_task(drafter.host.start())
        await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(starting, WAIT_S)


async def test_drafter_on_another_gpu_is_refused_with_both_names(folder: Path) -> None:
    device = HeldDevice(uuid="GPU-another")
    async with house(folder) as home:
        with pytest.raises(ConfigError, match="GPU-another") as caught:
            async with leased_drafter(home.path, device=device):
                pass
        assert home.physical.uuid in caught.value.message
