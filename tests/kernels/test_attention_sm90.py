"""The Hopper attention against the reference: lists, dense, ragged lengths, groups, correction.

Tolerance: `attention_case.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.planted import plant
from kernels.device import Device
from kernels.errors import InvalidArgument, LaunchError
from kernels.ops.attention_sm90 import (
    SCRATCH_BYTES,
    SHARED_LIMIT,
    TUNINGS,
    SparseAttention,
    Tensors,
    Tuning,
    takes,
)
from kernels.reference import BlockRule, round_to_bf16
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.attention_case import BLOCK, PADDING, Case, excess, make_case
from tests.kernels.on_device import from_bf16, to_bf16
from tests.tools import require_tool

RULE = BlockRule(sink_blocks=1, window_blocks=1, last_full_blocks=1)  # what is forced is little
POISON = 0xFF


case = partial(make_case, rule=RULE, head_dim=128, seed=7)


def attend(device: Device, given: Case, tuning: Tuning | None = None) -> NDArray[np.float32]:
    """Run the kernel in place on a QKV buffer; everything but q must come back as it was."""
    num_heads, num_tokens, head_dim = given.q.shape
    num_kv_heads = given.k.shape[0]
    columns = [x.transpose(1, 0, 2).reshape(num_tokens, -1) for x in (given.q, given.k, given.v)]
    padding = np.full((num_tokens, PADDING), 0xFFFF, np.uint16)
    rows = np.concatenate([*(to_bf16(x) for x in columns), padding], axis=1)
    k_mean, v_mean = (to_bf16(x) for x in given.means())
    parts = [rows, k_mean, v_mean]
    if given.lists:
        parts += [given.lists.indices, given.lists.counts]
    memories = [device.allocate(part.nbytes) for part in parts]
    scratch = device.allocate(SCRATCH_BYTES)
    for memory, part in zip(memories, parts, strict=True):
        device.upload(memory.address, part)
    device.fill(scratch.address, SCRATCH_BYTES, POISON)
    addresses = [memory.address for memory in memories]
    q_width = num_heads * head_dim
    kv_width = num_kv_heads * head_dim
    tensors = Tensors(
        q=addresses[0],
        k=addresses[0] + 2 * q_width,
        v=addresses[0] + 2 * (q_width + kv_width),
        row_stride=rows.shape[1],
        k_mean=addresses[1] if given.correct else 0,
        v_mean=addresses[2] if given.correct else 0,
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    attention = SparseAttention(
        device,
        tensors,
        scratch=scratch.address,
        full_tiles=RULE.last_full_blocks,
        scale=given.scale,
        tuning=tuning,
    )
    indices, counts = addresses[3:] if given.lists else (0, 0)
    attention.launch(indices=indices, counts=counts)
    after = np.empty_like(rows)
    device.download(addresses[0], after)
    for memory in (*memories, scratch):
        memory.close()
    assert np.array_equal(after[:, q_width:], rows[:, q_width:])
    out = from_bf16(after[:, :q_width])
    return out.reshape(num_tokens, num_heads, head_dim).transpose(1, 0, 2)


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 700])
def test_dense_attention_equals_the_reference(hopper_device: Device, num_tokens: int) -> None:
    given = case(num_tokens)
    assert excess(attend(hopper_device, given), given) <= 1


@pytest.mark.parametrize("num_tokens", [127, 129, 1100])
def test_lists_with_correction_equal_the_reference(hopper_device: Device, num_tokens: int) -> None:
    given = case(num_tokens, density=0.5)
    assert excess(attend(hopper_device, given), given) <= 1


def test_lists_without_correction_equal_the_reference(hopper_device: Device) -> None:
    given = case(1100, density=0.5, correct=False)
    assert excess(attend(hopper_device, given), given) <= 1


def test_lists_of_the_diagonal_alone_equal_the_reference(hopper_device: Device) -> None:
    given = case(1100, num_heads=4, num_kv_heads=2, head_dim=64)
    alone = plant(0.0, 4, 9, BlockRule(sink_blocks=0, window_blocks=1, last_full_blocks=0))
    assert np.array_equal(alone.counts, np.ones((4, 9)))
    given = replace(given, lists=alone)
    assert excess(attend(hopper_device, given), given) <= 1


@pytest.mark.parametrize("head_dim", [64, 256])
def test_other_head_dims_equal_the_reference(hopper_device: Device, head_dim: int) -> None:
    given = case(700, head_dim=head_dim, density=0.5)
    assert excess(attend(hopper_device, given), given) <= 1


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (6, 2), (4, 1)])
def test_query_heads_read_their_own_kv_head(
    hopper_device: Device, num_heads: int, num_kv_heads: int
) -> None:
    given = case(
        400, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=64, density=0.5, seed=8
    )
    assert excess(attend(hopper_device, given), given) <= 1


def test_a_full_list_gives_the_bits_of_dense_attention(hopper_device: Device) -> None:
    dense = case(500, head_dim=64)
    full = replace(dense, lists=plant(1.0, 2, 4, BlockRule(last_full_blocks=4)))
    assert np.array_equal(attend(hopper_device, full), attend(hopper_device, dense))


@pytest.mark.parametrize(
    "tuning",
    [
        replace(TUNINGS[128], persistent=0),
        replace(TUNINGS[128], ping_pong=0),
        replace(TUNINGS[128], query_slots=1),
    ],
    ids=["a block an item", "no turns", "one query slot"],
)
def test_knobs_change_no_bit(hopper_device: Device, tuning: Tuning) -> None:
    given = case(600, density=0.5)
    usual = attend(hopper_device, given)
    assert np.array_equal(attend(hopper_device, given, tuning), usual)


def test_order_of_threads_and_blocks_changes_no_bit() -> None:
    require_tool("g++")
    device = EmulatedDevice("sm_90a", check_races=True)
    given = case(843, num_heads=4, num_kv_heads=2, head_dim=64, density=0.5)
    assert excess(attend(device, given), given) <= 1
    device.close()


def test_half_key_tiles_equal_the_reference(hopper_device: Device) -> None:
    # 67 blocks: the second tile of means holds two of this head and runs into the next one's.
    given = case(66 * BLOCK + 5, num_kv_heads=2, head_dim=64, density=0.03)
    halves = replace(TUNINGS[64], key_tile=64)
    assert excess(attend(hopper_device, given, halves), given) <= 1


def test_large_scores_overflow_nothing(hopper_device: Device) -> None:
    given = case(300, density=0.5)
    given = replace(given, q=round_to_bf16(given.q * 64))
    assert np.isfinite(attend(hopper_device, given)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [4095, 8193, 130 * BLOCK + 5])
def test_long_prompts_equal_the_reference(cuda_device: Device, num_tokens: int) -> None:
    if cuda_device.arch != "sm_90a":
        pytest.skip(f"needs a Hopper GPU, this one is {cuda_device.arch}")
    given = case(num_tokens, num_heads=4, num_kv_heads=2, density=0.2)
    out = attend(cuda_device, given)
    assert excess(out, given) <= 1
    assert np.array_equal(attend(cuda_device, given), out)


# ---- defects that the tests above must find ----

MAIN, LOAD, SHARED = "attention_sm90.cu", "attention_sm90_load.cuh", "attention_sm90.cuh"
DEFECTS = {
    "a parity that never turns": Edit(SHARED, "parity ^= 1;", ""),
    "no rescale of the output": Edit(MAIN, "*= rescale[i % 4 / 2];", "*= 1.0f;"),
    "a diagonal that is not causal": Edit(MAIN, "i / 4 * 8 + i % 2 > limit", "i / 4 * 8 > 512"),
    "no correction": Edit(LOAD, "problem.corrected && row.count", "false && row.count"),
    "listed blocks corrected for too": Edit(
        LOAD, "offsets[blocks] = negative_infinity();", "offsets[blocks] += 0.0f;"
    ),
    "another group's KV head": Edit(LOAD, "row.head / group", "row.head % problem.num_kv_heads"),
    "the next head's means": Edit(
        LOAD, "kv_head * problem.num_tiles + part", "problem.num_tiles + part"
    ),
    "an unwritten last row": Edit(
        MAIN, "token < problem.num_tokens", "token + 1 < problem.num_tokens"
    ),
    "a row past the end": Edit(MAIN, "token < problem.num_tokens", "token <= problem.num_tokens"),
    "V of the wrong step": Edit(
        MAIN, "(step * K_STEP * PANEL_STRIDE) >> 4", "((step ^ 1) * K_STEP * PANEL_STRIDE) >> 4"
    ),
    "output kept from the item before": Edit(
        MAIN, "bool accumulate = false;", "bool accumulate = true;"
    ),
    "sums of the next item": Edit(
        MAIN, "store_output(w, item, sum,", "store_output(w, item, w.softmax.sum,"
    ),
}


def found(edits: Sequence[Edit]) -> bool:
    """Whether a defect shows: the emulator refuses the run, or the numbers are off."""
    device = EmulatedDevice("sm_90a", edits=edits)
    given = case(843, num_heads=4, num_kv_heads=2, head_dim=64, density=0.5, seed=9)
    try:
        return excess(attend(device, given), given) > 1
    except (LaunchError, AssertionError):
        return True
    finally:
        device.close()


def test_without_a_defect_nothing_is_found() -> None:
    require_tool("g++")
    assert not found(())


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name: str) -> None:
    require_tool("g++")
    assert found((DEFECTS[name],))


# ---- what is refused ----


def test_path_exists_where_architecture_and_sizes_allow_it() -> None:
    assert takes("sm_90a", 128, 262_144)
    assert not takes("sm_100", 128, 1000)
    assert not takes("sm_90a", 96, 1000)
    assert not takes("sm_90a", 128, 1 << 20)


def test_every_tuning_leaves_room_for_a_long_prompt() -> None:
    for head_dim, tuning in TUNINGS.items():
        assert tuning.shared_bytes(head_dim, 262_144) <= SHARED_LIMIT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 96}, "head_dim must be one of"),
        ({"num_heads": 3}, "num_heads must be a multiple of 2"),
        ({"row_stride": 1001}, "row_stride must be a multiple of 8"),
        ({"row_stride": 128}, "row_stride must be >= 256"),
        ({"k": 8}, "k must be on a multiple of 16 bytes"),
        ({"v_mean": 0}, "v_mean must be given with k_mean"),
        ({"num_tokens": 0}, "num_tokens must be in"),
    ],
)
def test_impossible_tensors_are_refused(change: dict[str, int], message: str) -> None:
    tensors = Tensors(
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
    device = EmulatedDevice("sm_90a")
    with pytest.raises(InvalidArgument, match=message):
        SparseAttention(device, replace(tensors, **change), scratch=16, full_tiles=0, scale=0.1)
