"""The scoring kernel against the float64 reference: ragged lengths, groups, long rows of blocks.

Tolerance. A logit is a sum of HEAD_DIM exact products in fp32, and the exponents, of at most 2^6
as powers of two, carry an error of about 2^-17 from it; the approximate exp2 and a sum of 128 add
less. A mass may be off by 1e-4 of itself; masses below 1e-30 of the largest may be zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.device import Device
from kernels.errors import InvalidArgument, KernelError
from kernels.ops.block_score import block_score, shared_bytes
from kernels.reference import block_mass, block_mean, round_to_bf16
from kernels.reference import block_score as reference_score
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.inputs import structured_qkv
from tests.kernels.on_device import Arrays, to_bf16
from tests.tools import require_tool

BLOCK = 128
PADDING = 8  # columns behind q, as K and V stand there
TOLERANCE, FLOOR = 1e-4, 1e-30
UNWRITTEN = -7.0
SMALLEST_SHARED_BYTES = 99 << 10  # of a block of threads, sm_89


@dataclass(frozen=True)
class Case:
    """q [num_heads, num_tokens, head_dim], k_mean [num_kv_heads, num_blocks, head_dim]; bf16."""

    q: NDArray[np.float32]
    k_mean: NDArray[np.float32]

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.q.shape[-1])


def case(
    num_tokens: int,
    *,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    seed: int = 51,
) -> Case:
    """Queries that like some blocks more than others, and the blocks' means."""
    q, k, _ = structured_qkv(
        num_tokens, seed=seed, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    return Case(round_to_bf16(q), block_mean(k, BLOCK))


def score(device: Device, given: Case) -> NDArray[np.float32]:
    """Run the kernel: mass [num_heads, num_tiles, num_blocks], UNWRITTEN where it wrote nothing."""
    num_heads, num_tokens, head_dim = given.q.shape
    num_kv_heads, num_blocks, _ = given.k_mean.shape
    rows = to_bf16(given.q.transpose(1, 0, 2).reshape(num_tokens, -1))
    padding = np.full((num_tokens, PADDING), 0xFFFF, np.uint16)
    rows = np.concatenate([rows, padding], axis=1)
    shape = (num_heads, num_blocks, num_blocks)
    with Arrays(device) as arrays:
        mass = arrays.put(np.full(shape, UNWRITTEN, np.float32))
        block_score(
            device,
            q=arrays.put(rows),
            row_stride=rows.shape[1],
            k_mean=arrays.put(to_bf16(given.k_mean)),
            mass=mass,
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=given.scale,
        )
        found: NDArray[np.float32] = arrays.get(mass, shape, np.float32)
    return found


def right(mass: NDArray[np.float32], given: Case) -> bool:
    """Whether every mass is the reference's, and nothing stands past the diagonal."""
    scores = reference_score(given.q, given.k_mean, block_tokens=BLOCK, scale=given.scale)
    expected = block_mass(*scores)
    visible = np.tril(np.ones(mass.shape[1:], dtype=np.bool_))
    close = np.isclose(mass, expected, rtol=TOLERANCE, atol=FLOOR)
    return bool(np.where(visible, close, mass == UNWRITTEN).all())


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 1100])
def test_masses_equal_the_reference(device: Device, num_tokens: int) -> None:
    given = case(num_tokens)
    assert right(score(device, given), given)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_other_head_dims_equal_the_reference(device: Device, head_dim: int) -> None:
    given = case(1100, num_heads=1, head_dim=head_dim)
    assert right(score(device, given), given)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (6, 2), (4, 1)])
def test_query_heads_read_their_own_kv_head(
    device: Device, num_heads: int, num_kv_heads: int
) -> None:
    given = case(270, num_heads=num_heads, num_kv_heads=num_kv_heads)
    assert right(score(device, given), given)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_rows_longer_than_the_means_in_work_equal_the_reference(
    device: Device, head_dim: int
) -> None:
    blocks = 130 if head_dim == 64 else 66  # 128 and 64 are in work at once
    given = case((blocks - 1) * BLOCK + 5, num_heads=1, head_dim=head_dim)
    assert right(score(device, given), given)


def test_a_strong_block_outweighs_an_evenly_liked_one(device: Device) -> None:
    q = np.zeros((1, 384, 64), dtype=np.float32)
    q[0, :, 0] = 8.0
    q[0, 256, 1] = 80.0  # one query of the last tile likes block 1 far more than anything else
    k_mean = np.zeros((1, 3, 64), dtype=np.float32)
    k_mean[0, 1, 1] = 1.0
    mass = score(device, Case(q, k_mean))
    assert mass[0, 2, 1] > 10 * mass[0, 2, 0]


def test_masses_far_below_the_largest_are_zero_and_never_nan(device: Device) -> None:
    given = case(400)
    given = replace(given, q=round_to_bf16(given.q * 64))
    mass = score(device, given)[:, np.tri(4, dtype=np.bool_)]
    assert np.isfinite(mass).all() and (mass >= 0).all()


def test_the_same_inputs_give_the_same_bits_in_any_order_of_threads() -> None:
    require_tool("g++")
    device = EmulatedDevice(check_races=True)
    score(device, case(300))
    device.close()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [4095, 8193])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_prompts_equal_the_reference(
    cuda_device: Device, num_tokens: int, head_dim: int
) -> None:
    given = case(num_tokens, num_heads=4, num_kv_heads=2, head_dim=head_dim)
    mass = score(cuda_device, given)
    assert right(mass, given)
    assert np.array_equal(score(cuda_device, given), mass)


# ---- defects that the tests above must find ----

DEFECTS = {
    "a permuted fragment of queries": (
        "mma_m16n8k16(logits[m][n], a[m], b[0], b[1]);",
        "mma_m16n8k16(logits[m][n], a[m], b[1], b[0]);",
    ),
    "means beside their logits": ("half * 8 + lane / 4", "half * 8 + lane / 4 * 2 % 8"),
    "no rescale": (" * exp2_approx(row[block].x - largest)", ""),
    "a maximum of one register": ("quad_max(peak)", "peak"),
    "all queries for the diagonal block": ("block == tile ? rows - 1 : 0", "0"),
    "the last but one query for the diagonal block": ("? rows - 1 : 0", "? rows - 2 : 0"),
    "queries past the end counted": ("query >= rows)", "query >= 128)"),
    "rows read past the end": ("const bool valid = query < rows;", "const bool valid = true;"),
    "an unwritten last block": (
        "block <= tile; block += WARPS * WARP",
        "block < tile; block += WARPS * WARP",
    ),
    "masses past the diagonal": (
        "block <= tile; block += WARPS * WARP",
        "block < num_blocks; block += WARPS * WARP",
    ),
    "another group's KV head": ("head / group", "head % (int(gridDim.x) / group)"),
    "the other stage": (
        "mean_lane + panels_read % 2 * STAGE_BYTES",
        "mean_lane + (panels_read + 1) % 2 * STAGE_BYTES",
    ),
    "no barrier before the rescale": ("  __syncthreads();\n\n  float", "  float"),
}


def found(edits: Sequence[Edit]) -> bool:
    """Whether a defect shows: the emulator refuses the run, or the masses are off."""
    device = EmulatedDevice(order="reverse", edits=edits)  # late warps first, as barriers forbid
    cases = (case(459, num_heads=4, num_kv_heads=2), case(33 * BLOCK + 5, num_heads=1))
    try:
        return not all(right(score(device, given), given) for given in cases)
    except KernelError:
        return True
    finally:
        device.close()


def test_without_a_defect_nothing_is_found() -> None:
    require_tool("g++")
    assert not found(())


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name: str) -> None:
    require_tool("g++")
    assert found([Edit("block_score.cu", *DEFECTS[name])])


# ---- what is refused ----


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_smallest_shared_memory_holds_a_long_prompt(head_dim: int) -> None:
    assert shared_bytes(head_dim, 262_144 // BLOCK) <= SMALLEST_SHARED_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 96}, "HEAD_DIM in"),
        ({"num_heads": 3}, "num_heads must be a multiple of 2"),
        ({"row_stride": 129}, "row_stride must be a multiple of 8"),
        ({"k_mean": 8}, "k_mean must be on a multiple of 16 bytes"),
        ({"num_tokens": 0}, "num_tokens must be in"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
)
def test_impossible_calls_are_refused(change: dict[str, int], message: str) -> None:
    given = {
        "q": 0,
        "row_stride": 128,
        "k_mean": 0,
        "mass": 0,
        "num_tokens": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 64,
        "scale": 0.125,
    }
    with pytest.raises(InvalidArgument, match=message):
        block_score(EmulatedDevice(), **{**given, **change})  # type: ignore[arg-type]
