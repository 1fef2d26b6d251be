"""The portable attention kernel against the reference: dense, lists, correction, ragged, groups.

Tolerance: `attention_case.py`; in the mean square, a quarter more than the reference whose weights
and output are rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from kernels.device import Device
from kernels.errors import InvalidArgument, KernelError
from kernels.ops import attention_sm90
from kernels.ops.attention_sm90 import Tensors
from kernels.ops.block_score import block_score
from kernels.ops.block_select import block_select
from kernels.ops.sparse_attention import SparseAttention, attention_on, shared_bytes
from kernels.reference import BlockLists, BlockRule, round_to_bf16
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.attention_case import (
    BLOCK,
    PADDING,
    Case,
    Values,
    all_causal,
    excess,
    expected,
    make_case,
)
from tests.kernels.on_device import Arrays, from_bf16, to_bf16
from tests.tools import require_tool

RULE = BlockRule(sink_blocks=0, window_blocks=1, last_full_blocks=0)  # prunes short prompts too
SMALLEST_SHARED_BYTES = 99 << 10  # of a block of threads, sm_89


case = partial(make_case, rule=RULE, head_dim=64, seed=41)


def attend(device: Device, given: Case) -> Values:
    """Run the kernel in place on a QKV buffer; everything but q must come back as it was."""
    num_heads, num_tokens, head_dim = given.q.shape
    columns = [x.transpose(1, 0, 2).reshape(num_tokens, -1) for x in (given.q, given.k, given.v)]
    q_width, kv_width = columns[0].shape[1], columns[1].shape[1]
    padding = np.full((num_tokens, PADDING), 0xFFFF, np.uint16)
    rows = np.concatenate([*(to_bf16(x) for x in columns), padding], axis=1)
    with Arrays(device) as arrays:
        q = arrays.put(rows)
        means = [arrays.put(to_bf16(x)) if given.correct else 0 for x in given.means()]
        tensors = Tensors(
            q=q,
            k=q + 2 * q_width,
            v=q + 2 * (q_width + kv_width),
            row_stride=rows.shape[1],
            k_mean=means[0],
            v_mean=means[1],
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=given.k.shape[0],
            head_dim=head_dim,
        )
        attention = SparseAttention(device, tensors, scale=given.scale)
        if given.lists:
            indices, counts = arrays.put(given.lists.indices), arrays.put(given.lists.counts)
            attention.launch(indices=indices, counts=counts)
        else:
            attention.launch(indices=0, counts=0)
        after = arrays.get(q, rows.shape, np.uint16)
    assert np.array_equal(after[:, q_width:], rows[:, q_width:])
    out = from_bf16(after[:, :q_width])
    return out.reshape(num_tokens, num_heads, head_dim).transpose(1, 0, 2)


def chosen(device: Device, given: Case, rule: BlockRule) -> BlockLists:
    """Score and select on the device."""
    num_heads, num_tokens, head_dim = given.q.shape
    num_blocks = -(-num_tokens // BLOCK)
    rows, shape = (num_heads, num_blocks), (num_heads, num_blocks, num_blocks)
    with Arrays(device) as arrays:
        mass = arrays.poisoned(shape, np.float32)
        block_score(
            device,
            q=arrays.put(to_bf16(given.q.transpose(1, 0, 2).reshape(num_tokens, -1))),
            row_stride=num_heads * head_dim,
            k_mean=arrays.put(to_bf16(given.means()[0])),
            mass=mass,
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=given.k.shape[0],
            head_dim=head_dim,
            scale=given.scale,
        )
        indices, counts = arrays.poisoned(shape, np.int32), arrays.poisoned(rows, np.int32)
        cut = arrays.poisoned(rows, np.uint8)
        block_select(
            device,
            mass=mass,
            indices=indices,
            counts=counts,
            cut=cut,
            num_heads=num_heads,
            num_blocks=num_blocks,
            rule=rule,
        )
        return BlockLists(
            arrays.get(indices, shape, np.int32),
            arrays.get(counts, rows, np.int32),
            arrays.get(cut, rows, np.uint8).astype(np.bool_),
        )


def rounded_reference(given: Case) -> Values:
    """Dense attention in float64 whose weights and output are rounded to bf16 as the kernel's."""
    num_heads, num_tokens, _ = given.q.shape
    group = num_heads // given.k.shape[0]
    out = np.empty(given.q.shape, np.float32)
    for head in range(num_heads):
        logits = given.scale * (given.q[head].astype(np.float64) @ given.k[head // group].T)
        logits[np.triu_indices(num_tokens, 1)] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
        total = weights.sum(axis=1, keepdims=True, dtype=np.float64)
        product = round_to_bf16(weights).astype(np.float64) @ given.v[head // group]
        out[head] = round_to_bf16((product / total).astype(np.float32))
    return out


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 700])
def test_dense_attention_equals_the_reference(device: Device, num_tokens: int) -> None:
    given = case(num_tokens)
    assert excess(attend(device, given), given) <= 1


@pytest.mark.parametrize("num_tokens", [127, 129, 1100])
def test_lists_with_correction_equal_the_reference(device: Device, num_tokens: int) -> None:
    given = case(num_tokens, density=0.4)
    assert excess(attend(device, given), given) <= 1


def test_lists_without_correction_equal_the_reference(device: Device) -> None:
    given = case(1000, density=0.4, correct=False)
    assert excess(attend(device, given), given) <= 1


@pytest.mark.parametrize("head_dim", [128, 256])
def test_other_head_dims_equal_the_reference(device: Device, head_dim: int) -> None:
    given = case(459, head_dim=head_dim, density=0.4)
    assert excess(attend(device, given), given) <= 1


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (6, 2), (4, 1)])
def test_query_heads_read_their_own_kv_head(
    device: Device, num_heads: int, num_kv_heads: int
) -> None:
    given = case(270, num_heads=num_heads, num_kv_heads=num_kv_heads, density=0.4)
    assert excess(attend(device, given), given) <= 1


def test_the_error_is_that_of_rounding_weights_and_output(device: Device) -> None:
    given = case(300)
    reference = expected(given)[0]
    error = np.sqrt(np.mean((attend(device, given) - reference) ** 2))
    allowed = np.sqrt(np.mean((rounded_reference(given) - reference) ** 2))
    assert error <= 1.25 * allowed


def test_means_beyond_one_step_are_corrected_for(device: Device) -> None:
    # 67 blocks: the second step of means holds three of this head and runs into the next one's.
    given = case(66 * BLOCK + 5, num_heads=2, num_kv_heads=2, density=0.05)
    assert excess(attend(device, given), given) <= 1


def test_a_tile_that_lists_its_diagonal_alone_gets_the_rest_from_the_means(device: Device) -> None:
    given = case(400, density=0.4)
    assert given.lists
    alone = BlockLists(
        np.full_like(given.lists.indices, -1),
        np.ones_like(given.lists.counts),
        given.lists.cut,
    )
    alone.indices[:, :, 0] = np.arange(4)
    given = replace(given, lists=alone)
    assert excess(attend(device, given), given) <= 1


def test_a_full_list_gives_the_bits_of_dense_attention(device: Device) -> None:
    dense = case(500)
    full = replace(dense, lists=all_causal(2, 4))
    assert np.array_equal(attend(device, full), attend(device, dense))


def test_the_selection_of_everything_gives_the_bits_of_dense_attention(device: Device) -> None:
    dense = case(600)
    full = replace(dense, lists=chosen(device, dense, BlockRule(alpha=0.0, max_density=1.0)))
    assert np.array_equal(attend(device, full), attend(device, dense))


def test_the_lists_of_a_selection_equal_the_reference(device: Device) -> None:
    given = case(1100, num_heads=4, num_kv_heads=2)
    lists = chosen(device, given, BlockRule(sink_blocks=1, window_blocks=2))
    assert lists.density < 0.9
    given = replace(given, lists=lists)
    assert excess(attend(device, given), given) <= 1


def test_large_scores_overflow_nothing(device: Device) -> None:
    given = case(300, density=0.4)
    given = replace(given, q=round_to_bf16(given.q * 64))
    assert np.isfinite(attend(device, given)).all()


def test_the_same_inputs_give_the_same_bits_in_any_order_of_threads() -> None:
    require_tool("g++")
    device = EmulatedDevice(check_races=True)
    attend(device, case(200, density=0.4))
    device.close()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [4095, 8193])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_prompts_equal_the_reference(
    cuda_device: Device, num_tokens: int, head_dim: int
) -> None:
    given = case(num_tokens, num_heads=4, num_kv_heads=2, head_dim=head_dim, density=0.2)
    out = attend(cuda_device, given)
    assert excess(out, given) <= 1
    assert np.array_equal(attend(cuda_device, given), out)


# ---- defects that the tests above must find ----

DEFECTS = {
    "a permuted fragment of keys": (
        "mma_m16n8k16(logits[m][n], a[m], b[0], b[1]);",
        "mma_m16n8k16(logits[m][n], a[m], b[1], b[0]);",
    ),
    "a permuted fragment of values": (
        "mma_m16n8k16(out[m][n + 1], a[m], b[2], b[3]);",
        "mma_m16n8k16(out[m][n + 1], a[m], b[3], b[2]);",
    ),
    "weights beside their keys": ("[k16 * 2 + i / 2][i % 2 * 2]", "[k16 * 2 + i % 2][i / 2 * 2]"),
    "no rescale of the output": ("if (rescale != 1.0f)", "if (false)"),
    "no rescale of the sum": ("row_sum[m][half] * rescale", "row_sum[m][half]"),
    "a diagonal that is not causal": ("step >= diagonal_step", "step > 1 << 20"),
    "a diagonal off by one": ("> m * 16 + e / 2 * 8)", ">= m * 16 + e / 2 * 8)"),
    "rows read past the end": ("const bool valid = row < real;", "const bool valid = true;"),
    "an unwritten last row": ("if (row < rows)", "if (row + 1 < rows)"),
    "a row written past the end": ("if (row < rows)", "if (row <= rows)"),
    "another group's KV head": ("head / group", "head % (int(gridDim.x) / group)"),
    "the next head's means": ("(kv_head) * num_blocks", "(0) * num_blocks"),
    "no correction": ("steps += ceil_div(tile, KEYS);", ""),
    "a correction without its weight": ("LOG2_BLOCK_TOKENS : 0.0f", "0.0f : 0.0f"),
    "listed blocks corrected for too": (
        "atomicOr(&hidden[indices[i] >> 5], 1u << (indices[i] & 31));",
        "",
    ),
    "the diagonal corrected for too": ("FULL_WARP << (tile & 31)", "FULL_WARP << (tile & 31) << 1"),
    "reading before the copy is there": ("cp_async_wait<0>();", "cp_async_wait<1>();"),
    "no barrier behind the copies": ("__syncthreads();  // this", "__syncwarp();  // this"),
    "the keys of the other stage": (
        "k_stage = k_lane + step % 2",
        "k_stage = k_lane + (step + 1) % 2",
    ),
}


def found(edits: Sequence[Edit]) -> bool:
    """Whether a defect shows: the emulator refuses the run, or the numbers are off."""
    device = EmulatedDevice(edits=edits)
    given = case(459, num_heads=4, num_kv_heads=2, density=0.4)
    try:
        return excess(attend(device, given), given) > 1
    except (KernelError, AssertionError):
        return True
    finally:
        device.close()


def test_without_a_defect_nothing_is_found() -> None:
    require_tool("g++")
    assert not found(())


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name: str) -> None:
    require_tool("g++")
    assert found([Edit("sparse_attention.cu", *DEFECTS[name])])


# ---- which path, and what is refused ----

TENSORS = Tensors(
    q=0,
    k=512,
    v=1024,
    row_stride=1024,
    k_mean=4096,
    v_mean=8192,
    num_tokens=128,
    num_heads=2,
    num_kv_heads=2,
    head_dim=128,
)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100"])
def test_cards_without_a_path_of_their_own_get_the_portable_one(arch: str) -> None:
    device = EmulatedDevice(arch)
    path = attention_on(device, TENSORS, scratch=16, full_tiles=0, scale=0.1)
    assert isinstance(path, SparseAttention)


def test_hopper_gets_its_own_path_where_the_sizes_allow_it() -> None:
    device = EmulatedDevice("sm_90a")
    with Arrays(device) as arrays:
        at = arrays.poisoned(1 << 20, np.uint8)
        tensors = replace(TENSORS, q=at, k=at + 512, v=at + 1024, k_mean=at, v_mean=at)
        path = attention_on(device, tensors, scratch=at, full_tiles=0, scale=0.1)
        assert isinstance(path, attention_sm90.SparseAttention)
        longer = replace(tensors, num_tokens=1 << 22)
        path = attention_on(device, longer, scratch=at, full_tiles=0, scale=0.1)
        assert isinstance(path, SparseAttention)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_smallest_shared_memory_holds_a_long_prompt(head_dim: int) -> None:
    assert shared_bytes(head_dim, 1_048_576 // BLOCK) <= SMALLEST_SHARED_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 96}, "HEAD_DIM in"),
        ({"num_heads": 3}, "num_heads must be a multiple of 2"),
        ({"row_stride": 1001}, "row_stride must be a multiple of 8"),
        ({"row_stride": 128}, "row_stride must be >= 256"),
        ({"k": 8}, "k must be on a multiple of 16 bytes"),
        ({"v_mean": 0}, "v_mean must be given with k_mean"),
        ({"num_tokens": 0}, "num_tokens must be in"),
    ],
)
def test_impossible_tensors_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        SparseAttention(EmulatedDevice(), replace(TENSORS, **change), scale=0.1)
