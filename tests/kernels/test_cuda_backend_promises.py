"""What the CUDA backend promises beside its scores: the same bits, stops, refusals, its memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drafter_svc.backend import AttentionConfig, ScoreInput
from drafter_svc.cuda_attention import most_sparse_rows
from drafter_svc.cuda_backend import CudaBackend
from drafter_svc.cuda_workspace import Workspace, WorkspacePlan
from kernels.device import Device, KernelSource, Memory
from kernels.reference import BlockLists, BlockRule
from skim.errors import Busy, Cancelled, InvalidRequest, PromptTooLong
from tests.fixtures.cuda_backend import (
    EVERYTHING,
    SPARSE,
    Machine,
    assert_same,
    emulated,
    machine,
    model,
    prompt,
    run,
)

__all__ = ["machine"]


def test_the_same_request_twice_gives_the_same_bits(machine: Machine, tmp_path: Path) -> None:
    backend, request = (
        machine.cuda(model(tmp_path)),
        ScoreInput(prompt(300, seed=9), attention=SPARSE),
    )
    first, second = run(backend, request), run(backend, request)
    assert first.panel is not None and second.panel is not None
    np.testing.assert_array_equal(first.scores, second.scores)
    np.testing.assert_array_equal(first.panel, second.panel)


def test_a_short_prompt_after_a_long_one_is_scored_as_if_alone(
    machine: Machine, tmp_path: Path
) -> None:
    """The arena keeps what the longer pass left in it."""
    path, short = model(tmp_path), ScoreInput(prompt(200, seed=10), attention=SPARSE)
    backend = machine.cuda(path)
    run(backend, ScoreInput(prompt(400, seed=11), attention=SPARSE))
    np.testing.assert_array_equal(run(backend, short).scores, run(machine.cuda(path), short).scores)


def test_progress_rises_by_one_layer_from_none_to_all(machine: Machine, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    machine.cuda(model(tmp_path)).score(
        ScoreInput(prompt(200, seed=12)),
        stop=threading.Event(),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_stopped_pass_is_cancelled_between_layers_and_the_next_one_is_right(
    machine: Machine, tmp_path: Path
) -> None:
    pair, stop = machine.pair(model(tmp_path)), threading.Event()
    told: list[int] = []

    def stop_after_the_first(done: int, total: int) -> None:
        told.append(done)
        if done == 1:
            stop.set()

    request = ScoreInput(prompt(300, seed=13))
    with pytest.raises(Cancelled):
        pair.cuda.score(request, stop=stop, progress=stop_after_the_first)
    assert told == [0, 1]
    assert_same(run(pair.cuda, request), run(pair.cpu, request))


@pytest.mark.parametrize("bad", [-1, 100_000])
def test_an_id_outside_the_vocabulary_is_refused(
    machine: Machine, tmp_path: Path, bad: int
) -> None:
    ids = prompt(50, seed=14)
    ids[20] = bad
    with pytest.raises(InvalidRequest) as caught:
        run(machine.cuda(model(tmp_path, layers=1)), ScoreInput(ids))
    assert caught.value.field == "ids" and caught.value.metadata["got"] == repr(bad)


@pytest.mark.parametrize(
    ("field_name", "options"),
    [
        ("lookahead_tokens", {"lookahead_tokens": 4}),
        ("attention.block_tokens", {"attention": AttentionConfig(block_tokens=64)}),
        ("pool_kernel", {"pool_kernel": 1025}),
    ],
)
def test_what_the_kernels_do_not_do_is_refused_by_name(
    machine: Machine, tmp_path: Path, field_name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        run(machine.cuda(model(tmp_path, layers=1)), ScoreInput(prompt(50, seed=15), **options))
    assert caught.value.field == field_name


@pytest.mark.parametrize(("query", "copied"), [(None, 0), ((20, 60), 40)])
def test_a_prompt_of_more_blocks_than_are_selected_from_is_refused_before_any_work(
    tmp_path: Path, query: tuple[int, int] | None, copied: int
) -> None:
    backend = CudaBackend.open(model(tmp_path, layers=1), emulated("sm_89"))
    told: list[int] = []
    most = most_sparse_rows("sm_89", 64)
    request = ScoreInput(prompt(most + 1, seed=23), query_tokens=query)
    with pytest.raises(PromptTooLong) as caught:
        backend.score(request, stop=threading.Event(), progress=lambda done, _: told.append(done))
    assert caught.value.metadata == {"limit": str(most - copied), "got": str(most + 1)}
    assert caught.value.field == "prompt"
    assert told == [] and backend.workspace.num_bytes == 0
    backend.close()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_after_the_warm_up_no_pass_needs_another_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    device = emulated(arch)
    backend = CudaBackend.open(model(tmp_path, layers=2), device, planted=only_the_diagonal)
    launched: set[KernelSource] = set()
    launch = device.launch

    def note(source: KernelSource, *arguments: Any, **options: Any) -> None:
        launched.add(source)
        launch(source, *arguments, **options)

    monkeypatch.setattr(device, "launch", note)
    assert backend.warm_up(num_tokens=300) > 0.0
    warm = launched.copy()
    for options in (
        {"attention": SPARSE},
        {"query_tokens": (2, 20)},
        {"scorer": "mid_layer", "pool_kernel": 7},
    ):
        run(backend, ScoreInput(prompt(280, seed=24), **options))
    assert launched == warm and len(warm) > 10
    backend.close()


def test_the_warm_up_keeps_no_memory_plants_nothing_and_can_be_stopped(tmp_path: Path) -> None:
    asked: list[int] = []
    backend = CudaBackend.open(
        model(tmp_path, layers=2), emulated(), planted=lambda layer, *_: asked.append(layer)
    )
    free = backend.device.free_bytes()
    backend.warm_up(num_tokens=200)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        backend.warm_up(stop)
    assert (asked, backend.device.free_bytes()) == ([], free)
    run(backend, ScoreInput(prompt(200, seed=25), attention=SPARSE))
    assert asked
    backend.close()


def test_stages_cover_the_pass(machine: Machine, tmp_path: Path) -> None:
    result = run(machine.cuda(model(tmp_path)), ScoreInput(prompt(300, seed=16), attention=SPARSE))
    assert set(result.stage_s) == {"embed", "project", "find", "attend", "mlp", "score"}
    assert all(seconds > 0.0 for seconds in result.stage_s.values())


def only_the_diagonal(
    layer: int, num_heads: int, num_tiles: int, rule: BlockRule
) -> BlockLists | None:
    """Every tile reads its own block alone, in the first layer; the second is left as it is."""
    if layer:
        return None
    indices = np.full((num_heads, num_tiles, num_tiles), -1, dtype=np.int32)
    indices[:, :, 0] = np.arange(num_tiles)
    counts = np.ones((num_heads, num_tiles), dtype=np.int32)
    return BlockLists(indices, counts, np.zeros_like(counts, dtype=np.bool_))


def test_planted_lists_are_read_in_place_of_the_selected_ones(
    machine: Machine, tmp_path: Path
) -> None:
    path, request = model(tmp_path), ScoreInput(prompt(500, seed=17), attention=SPARSE)
    natural = run(machine.cuda(path), request)
    planted = run(machine.cuda(path, planted=only_the_diagonal), request)
    assert planted.density[0] == pytest.approx(4 / 10)
    assert planted.density[0] < natural.density[0]
    assert not np.array_equal(planted.scores, natural.scores)


@pytest.mark.parametrize("heads", [4, 2])  # with 2 the lists of 3 tiles are no 16 bytes
def test_planting_the_selected_lists_changes_no_bit(
    machine: Machine, tmp_path: Path, heads: int
) -> None:
    def all_blocks(layer: int, num_heads: int, num_tiles: int, rule: BlockRule) -> BlockLists:
        indices = np.tile(np.arange(num_tiles, dtype=np.int32), (num_heads, num_tiles, 1))
        counts = np.tile(np.arange(1, num_tiles + 1, dtype=np.int32), (num_heads, 1))
        return BlockLists(indices, counts, np.zeros_like(counts, dtype=np.bool_))

    path = model(tmp_path, heads=heads)
    request = ScoreInput(prompt(300, seed=18), attention=EVERYTHING)
    planted = run(machine.cuda(path, planted=all_blocks), request)
    np.testing.assert_array_equal(planted.scores, run(machine.cuda(path), request).scores)
    assert planted.density == (1.0, 1.0)


class GuardedWorkspace(Workspace):
    """Each section is an allocation of its own: a byte past its end is caught by the device."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._sections: dict[str, Memory] = {}

    def prepare(self, plan: WorkspacePlan) -> None:
        self.close()
        self._sections = {
            name: self._device.allocate(max(1, size)) for name, size in plan.sizes.items()
        }
        self.plan = plan

    def at(self, name: str) -> int:
        return self._sections[name].address

    def close(self) -> None:
        for memory in getattr(self, "_sections", {}).values():
            memory.close()
        self._sections = {}


@pytest.mark.parametrize("num_tokens", [1, 130, 520])
def test_no_kernel_leaves_its_section_of_the_workspace(tmp_path: Path, num_tokens: int) -> None:
    backend = CudaBackend.open(model(tmp_path), emulated())
    backend.workspace = GuardedWorkspace(backend.device)
    guarded = run(backend, ScoreInput(prompt(num_tokens, seed=19), attention=SPARSE))
    assert np.isfinite(guarded.scores).all()
    backend.close()


def test_a_pass_takes_what_was_planned_and_close_gives_everything_back(tmp_path: Path) -> None:
    device = emulated()
    backend = CudaBackend.open(model(tmp_path), device, planted=only_the_diagonal)
    loaded = device.free_bytes()
    assert device.total_bytes - loaded == backend.model.weight_bytes
    run(backend, ScoreInput(prompt(300, seed=20), attention=SPARSE))
    taken = loaded - device.free_bytes()
    assert taken == backend.workspace.num_bytes + backend.planted.num_bytes
    assert backend.workspace.num_bytes == backend.workspace.plan.num_bytes
    backend.close()
    backend.close()
    assert device.free_bytes() == device.total_bytes


def test_a_prompt_that_does_not_fit_is_refused_and_a_shorter_one_is_scored(tmp_path: Path) -> None:
    path = model(tmp_path)
    weights = CudaBackend.open(path, emulated()).model.weight_bytes
    backend = CudaBackend.open(path, emulated(total_bytes=weights + (70 << 20)))
    run(backend, ScoreInput(prompt(100, seed=21)))
    with pytest.raises(Busy, match="30000 tokens") as caught:
        run(backend, ScoreInput(prompt(30_000, seed=22)))
    assert caught.value.reason == "GPU_MEMORY_EXHAUSTED"
    assert run(backend, ScoreInput(prompt(100, seed=21))).scores.size == 4
    backend.close()


def test_weights_that_do_not_fit_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    device = emulated(total_bytes=1 << 20)
    with pytest.raises(Busy):
        CudaBackend.open(model(tmp_path), device)
    assert device.free_bytes() == device.total_bytes
