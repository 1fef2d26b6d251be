"""The GPU pass's memory, planned without a GPU, and the layout of the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from bench.planted import PlantedLists, forced_blocks
from bench.random_model import SHAPES, write_random_gguf
from drafter_svc.cuda_weights import CudaWeights, check_shape, plan_layout, source_names
from drafter_svc.cuda_workspace import (
    SHRINK_AFTER,
    PassSize,
    Workspace,
    WorkspacePlan,
    plan_pass,
)
from kernels.reference import BlockRule
from modelfile.gguf_file import GgufFile
from modelfile.hparams import ModelShape, expected_tensors
from skim.errors import ModelFileError
from tests.fixtures.planted_drafter import planted_drafter

GIB = 1 << 30


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """Qwen3-0.6B, its 28 layers included, from a file of one layer."""
    path = tmp_path_factory.mktemp("shape") / "one.gguf"
    one = replace(SHAPES["qwen3-0.6b"], vocab_size=1024, layers=1)
    with GgufFile.open(write_random_gguf(path, one)) as file:
        shape = ModelShape.from_gguf(file)
    return replace(shape, layers=28, vocab_size=151_936)


def pass_of(num_tokens: int, **changes: int) -> PassSize:
    size = PassSize(num_tokens, num_tokens, 9, 32, 27, 3, sparse=True)
    return replace(size, **changes)


def test_workspace_of_131072_tokens_of_qwen3_0_6b_stays_under_3_gib(qwen: ModelShape) -> None:
    plan = plan_pass(qwen, pass_of(131_072))
    assert plan.sizes["x"] == GIB // 2
    assert plan.sizes["qkv"] == GIB
    assert plan.sizes["mass"] + plan.sizes["indices"] == 128 << 20
    assert plan.num_bytes < 3 * GIB


def test_sections_are_aligned_and_do_not_overlap(qwen: ModelShape) -> None:
    plan = plan_pass(qwen, pass_of(1001))
    end = 0
    for name, offset in plan.offsets.items():
        assert offset % 256 == 0 and offset >= end
        end = offset + plan.sizes[name]
    assert end <= plan.num_bytes


class Allocations:
    """The part of a device that the arena uses."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.held_bytes = 0

    def allocate(self, num_bytes: int) -> Allocation:
        self.made.append(num_bytes)
        self.held_bytes += num_bytes
        return Allocation(self, num_bytes)


@dataclass
class Allocation:
    owner: Allocations
    num_bytes: int
    address: int = 0

    def close(self) -> None:
        self.owner.held_bytes -= self.num_bytes


def arena_after(*needed_bytes: int) -> Allocations:
    """Prepare an arena for passes that need so much, one after the other."""
    device = Allocations()
    workspace = Workspace(device)  # type: ignore[arg-type]
    for num_bytes in needed_bytes:
        plan = WorkspacePlan()
        plan.add("x", num_bytes)
        workspace.prepare(plan)
        assert workspace.num_bytes == device.held_bytes >= num_bytes
    return device


@pytest.mark.parametrize(
    ("needed", "made"),
    [
        ((1024, 512, 1024, 256), [1024]),
        ((1024, 2048), [1024, 2048]),
        ((4096, *[256] * (SHRINK_AFTER - 1)), [4096]),
        ((4096, *[256] * (SHRINK_AFTER - 1), 512), [4096, 512]),
        ((4096, 1024, *[256] * (SHRINK_AFTER - 1)), [4096, 1024]),
        ((4096, *[2048] * (2 * SHRINK_AFTER)), [4096]),
        ((4096, *[*[256] * (SHRINK_AFTER - 1), 4096] * 3), [4096]),
    ],
)
def test_arena_grows_at_once_and_shrinks_when_no_recent_pass_needed_half_of_it(
    needed: tuple[int, ...], made: list[int]
) -> None:
    assert arena_after(*needed).made == made


def test_plan_tells_its_largest_sections_and_the_sum() -> None:
    plan = WorkspacePlan()
    plan.add("small", 100)
    plan.add("x", 3 << 20)
    assert [line.split()[0] for line in plan.lines()] == ["x", "all"]


def test_dense_pass_needs_no_lists(qwen: ModelShape) -> None:
    sparse, dense = (plan_pass(qwen, pass_of(8000, sparse=sparse)) for sparse in (True, False))
    assert set(sparse.sizes) - set(dense.sizes) == {
        "k_mean",
        "v_mean",
        "mass",
        "indices",
        "counts",
        "cut",
    }


def test_layout_places_every_tensor_that_a_pass_reads(qwen: ModelShape) -> None:
    layout = plan_layout(qwen)
    named = [name for tensor in layout.tensors for name in source_names(tensor.name)]
    assert sorted(named) == sorted(set(expected_tensors(qwen)) - {"output_norm.weight"})
    sizes = {name: int(np.prod(shape)) for name, shape in expected_tensors(qwen).items()}
    for tensor in layout.tensors:
        together = sum(sizes[name] for name in source_names(tensor.name))
        assert int(np.prod(tensor.shape)) == together, tensor.name


def test_layout_is_one_region_in_the_order_of_a_pass(qwen: ModelShape) -> None:
    layout = plan_layout(qwen)
    end = 0
    for tensor in layout.tensors:
        assert tensor.offset % 256 == 0 and tensor.offset >= end
        end = tensor.offset + tensor.size_bytes
    assert layout.size_bytes % (2 << 20) == 0 and layout.size_bytes >= end
    assert layout.tensors[0].name == "token_embd"
    ends = [layout.end_of_layer(layer) for layer in range(qwen.layers)]
    assert ends == sorted(ends)


def test_layout_digest_follows_the_shape_alone(qwen: ModelShape) -> None:
    assert plan_layout(qwen).digest == plan_layout(replace(qwen, context_length=7)).digest
    assert plan_layout(qwen).digest != plan_layout(replace(qwen, ffn=3080)).digest


def test_weights_may_lie_at_any_address(qwen: ModelShape) -> None:
    weights = CudaWeights(qwen, 1 << 40)
    down, before = weights.layers[3].down, weights.layers[3].q_norm
    weights.rebase(1 << 41)
    assert weights.layers[3].down - down == weights.layers[3].q_norm - before == 1 << 40


def test_absent_tensors_have_address_zero() -> None:
    layer = CudaWeights(planted_drafter([{}]).shape, 1 << 40).layers[0]
    assert (layer.q_norm, layer.k_norm, layer.qkv_bias) == (0, 0, 0)


@pytest.mark.parametrize(("field", "value"), [("head_dim", 80), ("embed", 1020), ("ffn", 3074)])
def test_models_that_the_kernels_do_not_take_are_refused(
    qwen: ModelShape, field: str, value: int
) -> None:
    with pytest.raises(ModelFileError, match=str(value)) as caught:
        check_shape(replace(qwen, **{field: value}))
    assert caught.value.reason == "BACKEND_UNSUPPORTED"


@pytest.mark.parametrize(
    ("num_tiles", "asked", "real"), [(64, 0.05, 0.233), (128, 0.05, 0.121), (512, 0.05, 0.05)]
)
def test_planted_lists_have_the_larger_of_the_density_and_the_forced_floor(
    num_tiles: int, asked: float, real: float
) -> None:
    rule = BlockRule()
    lists = PlantedLists(asked)(0, 2, num_tiles, rule)
    assert lists is not None
    assert lists.density == pytest.approx(real, abs=5e-4)
    for head, tile in ((0, 0), (1, num_tiles // 2), (0, num_tiles - 1)):
        row = lists.row(head, tile)
        assert (np.diff(row) > 0).all() and row[-1] == tile
        assert np.isin(np.flatnonzero(forced_blocks(tile, num_tiles, rule)), row).all()


def test_planted_lists_differ_by_head_and_are_the_same_on_every_layer() -> None:
    planted, rule = PlantedLists(0.6), BlockRule()
    first, second = planted(0, 2, 40, rule), planted(5, 2, 40, rule)
    assert first is not None and first is second
    assert not np.array_equal(first.indices[0], first.indices[1])


def test_no_density_plants_nothing() -> None:
    assert PlantedLists(None)(0, 2, 40, BlockRule()) is None
