"""The drafter's description, health, and admin port: load, swap, drain, configuration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2

from skim.errors import InvalidRequest, ModelFileError, NotFound, Unavailable
from skim.rpc_errors import errors_from_peer
from skim.spans import check_canonical
from skim.v1 import admin_pb2, drafter_pb2
from skim.wire import spans_from_proto
from tests.fixtures.drafter_service import (
    DrafterService,
    acquired,
    long_text,
    running_drafter,
    until,
)

PROMPT = long_text(6)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest_asyncio.fixture
async def drafter() -> AsyncIterator[DrafterService]:
    async with running_drafter() as service:
        yield service


async def swap(drafter: DrafterService, name: str) -> admin_pb2.SwapDrafterResponse:
    async with errors_from_peer():
        return await drafter.admin.SwapDrafter(admin_pb2.SwapDrafterRequest(name=name))


async def load(drafter: DrafterService, name: str) -> admin_pb2.LoadDrafterResponse:
    async with errors_from_peer():
        return await drafter.admin.LoadDrafter(admin_pb2.LoadDrafterRequest(name=name))


async def drain(drafter: DrafterService, grace_s: float) -> admin_pb2.DrainResponse:
    async with errors_from_peer():
        return await drafter.admin.Drain(admin_pb2.DrainRequest(grace_s=grace_s))


async def test_description_tells_model_limits_and_scorers(drafter):
    seen = await drafter.describe()
    loaded = drafter.host.loaded
    assert (seen.model, seen.backend, seen.architecture, seen.layers) == ("one", "cpu", "qwen3", 2)
    assert (seen.model_digest, seen.layout_digest) == (loaded.model_digest, loaded.layout_digest)
    assert (seen.max_prompt_tokens, seen.trained_context_tokens) == (262_144, 4_096)
    assert (seen.queue_limit, seen.residency) == (8, drafter_pb2.RESIDENCY_STATE_RESIDENT)
    assert list(seen.scorers) == ["specprefill", "mid_layer", "lexical", "ends", "random"]


async def test_health_turns_serving_only_when_the_model_is_loaded():
    async with running_drafter(start=False) as service:
        assert await service.health() == NOT_SERVING
        assert await service.health("liveness") == SERVING
        await service.host.start()
        assert await service.health() == SERVING
        assert await service.health("skim.v1.DrafterService") == SERVING


async def test_swapped_model_scores_from_then_on(drafter):
    before = (await drafter.score(PROMPT)).result
    reply = await swap(drafter, "two")
    assert reply.previous == "one" and reply.swap_s > 0
    after = (await drafter.score(PROMPT)).result
    assert (after.model, (await drafter.describe()).architecture) == ("two", "qwen2")
    assert after.model_digest != before.model_digest
    assert after.prompt_tokens != before.prompt_tokens  # another vocabulary
    check_canonical(spans_from_proto(after.spans, PROMPT), PROMPT)
    assert drafter.backends["one"].closed
    assert await drafter.health() == SERVING


async def test_swap_there_and_back_scores_as_before(drafter):
    before = (await drafter.score(PROMPT)).result.spans
    await swap(drafter, "two")
    await swap(drafter, "one")
    assert (await drafter.score(PROMPT)).result.spans == before


async def test_swap_to_the_loaded_model_changes_nothing(drafter):
    reply = await swap(drafter, "one")
    assert (reply.previous, reply.swap_s) == ("one", 0.0)
    assert not drafter.backend.closed


async def test_swap_finishes_the_running_pass_and_refuses_new_requests_meanwhile(drafter):
    drafter.backend.gate.clear()
    running = asyncio.create_task(drafter.score(PROMPT))
    assert await acquired(drafter.backend.begun)
    swapping = asyncio.create_task(swap(drafter, "two"))
    for name in ("readiness", "skim.v1.DrafterService"):
        await drafter.until_not_serving(name)
    with pytest.raises(Unavailable) as caught:
        await drafter.score(PROMPT)
    assert caught.value.reason == "MODEL_SWAPPING" and caught.value.retry_after_s
    assert not swapping.done()
    drafter.backend.gate.set()
    assert (await running).result.model == "one"
    assert (await swapping).previous == "one"
    assert await drafter.health() == SERVING


async def test_request_that_waits_through_a_swap_is_scored_by_the_new_model(drafter):
    drafter.backend.gate.clear()
    running = asyncio.create_task(drafter.score(PROMPT))
    assert await acquired(drafter.backend.begun)
    waiting = asyncio.create_task(drafter.score(PROMPT))
    named = asyncio.create_task(drafter.score(PROMPT, model="one"))
    await until(lambda: drafter.host.queue.queued == 2)
    swapping = asyncio.create_task(swap(drafter, "two"))
    await drafter.until_not_serving()
    drafter.backend.gate.set()
    await swapping
    assert (await running).result.model == "one"
    moved = (await waiting).result
    with pytest.raises(NotFound):  # it asked for the model that is gone
        await named
    assert moved.model == "two"
    fresh = (await drafter.score(PROMPT)).result
    assert (moved.spans, moved.prompt_tokens) == (fresh.spans, fresh.prompt_tokens)


async def test_model_loaded_ahead_is_the_one_that_is_swapped_in(drafter):
    reply = await load(drafter, "two")
    assert reply.size_bytes == drafter.backends["two"].model.weight_bytes > 0
    assert reply.load_s > 0
    ahead = drafter.backends["two"]
    assert (await drafter.describe()).model == "one"
    await swap(drafter, "two")
    assert drafter.backend is ahead


async def test_unknown_name_is_not_found_and_names_those_there_are(drafter):
    for call in (load, swap):
        with pytest.raises(NotFound) as caught:
            await call(drafter, "three")
        assert caught.value.metadata == {"got": "three", "allowed": "one, two, broken"}


async def test_file_that_cannot_be_read_is_refused_and_the_old_model_goes_on(drafter):
    for call in (load, swap):
        with pytest.raises(ModelFileError, match="not a GGUF"):
            await call(drafter, "broken")
        assert await drafter.health() == SERVING
        assert (await drafter.score(PROMPT)).result.model == "one"
        assert not drafter.backend.closed


async def test_drain_lets_what_runs_finish_and_refuses_the_rest(drafter):
    drafter.backend.gate.clear()
    running = asyncio.create_task(drafter.score(PROMPT))
    assert await acquired(drafter.backend.begun)
    draining = asyncio.create_task(drain(drafter, 20.0))
    await drafter.until_not_serving()
    with pytest.raises(Unavailable) as caught:
        await drafter.score(PROMPT)
    assert caught.value.reason == "DRAINING"
    drafter.backend.gate.set()
    assert (await running).result
    assert (await draining).unfinished == 0
    assert await drafter.health() == NOT_SERVING


async def test_drain_counts_what_did_not_finish_in_time(drafter):
    drafter.backend.gate.clear()
    running = asyncio.create_task(drafter.score(PROMPT))
    assert await acquired(drafter.backend.begun)
    assert (await drain(drafter, 0.05)).unfinished == 1
    drafter.backend.gate.set()
    assert (await running).result


async def test_swap_of_a_drained_service_does_not_make_it_serve_again(drafter):
    await drain(drafter, 1.0)
    await swap(drafter, "two")
    assert await drafter.health() == NOT_SERVING


@pytest.mark.parametrize("grace_s", [-1.0, 3_601.0, float("nan")])
async def test_grace_out_of_range_is_refused(drafter, grace_s):
    with pytest.raises(InvalidRequest) as caught:
        await drain(drafter, grace_s)
    assert caught.value.field == "grace_s"
    assert await drafter.health() == SERVING


async def test_configuration_in_force_is_reported(drafter):
    reply = await drafter.admin.GetConfig(admin_pb2.GetConfigRequest())
    assert reply.settings == drafter.host.settings.describe()
    assert reply.settings["keep_ratio"] == "0.3"
