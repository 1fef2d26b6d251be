"""Each intrinsic against NumPy: what every lane gets, by the layouts of the PTX ISA.

The same probes run on the emulator and, with `-m gpu`, on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.device import KernelSource
from kernels.reference.rounding import round_to_bf16
from tests.emulator.running import Run

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4  # %groupID and %threadID_in_group of the PTX ISA


def layout(entry: str) -> KernelSource:
    return KernelSource("layouts.cu", entry)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Raw bits of the nearest bfloat16."""
    return (round_to_bf16(values.astype(np.float32)).view(np.uint32) >> 16).astype(np.uint16)


def to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pairs(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def test_ldmatrix_gives_lane_l_two_neighbours_of_row_l_over_4(run_both: Run) -> None:
    rows = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = run_both(layout("load_straight"), rows, np.zeros((32, 4), np.uint32), shared_bytes=512)[1]
    for matrix in range(4):
        wanted = pairs(rows[matrix, GROUP, 2 * IN_GROUP], rows[matrix, GROUP, 2 * IN_GROUP + 1])
        np.testing.assert_array_equal(out[:, matrix], wanted)


def test_ldmatrix_trans_gives_lane_l_two_neighbours_of_column_l_over_4(run_both: Run) -> None:
    rows = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = run_both(layout("load_across"), rows, np.zeros((32, 4), np.uint32), shared_bytes=512)[1]
    for matrix in range(4):
        wanted = pairs(rows[matrix, 2 * IN_GROUP, GROUP], rows[matrix, 2 * IN_GROUP + 1, GROUP])
        np.testing.assert_array_equal(out[:, matrix], wanted)


def test_mma_multiplies_fragments_laid_out_as_the_isa_says(run_both: Run) -> None:
    rng = np.random.default_rng(1)
    a, b = (to_bf16(rng.standard_normal(shape)) for shape in ((16, 16), (16, 8)))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    # The ISA numbers elements: a0..a7, b0..b3, c0..c3; a register holds two of a or b.
    a_lanes, b_lanes = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    c_lanes = np.zeros((32, 4), np.float32)
    c_rows = np.zeros((32, 4), np.intp)
    for i in range(8):
        row = GROUP + (0 if i < 2 or 4 <= i < 6 else 8)
        a_lanes[:, i] = a[row, IN_GROUP * 2 + (i & 1) + (0 if i < 4 else 8)]
    for i in range(4):
        b_lanes[:, i] = b[IN_GROUP * 2 + (i & 1) + (0 if i < 2 else 8), GROUP]
        c_rows[:, i] = GROUP + (0 if i < 2 else 8)
        c_lanes[:, i] = c[c_rows[:, i], IN_GROUP * 2 + (i & 1)]
    out = run_both(layout("multiply"), a_lanes.view(np.uint32), b_lanes.view(np.uint32), c_lanes)[2]
    wanted = c + to_float(a).astype(np.float64) @ to_float(b).astype(np.float64)
    for i in range(4):
        np.testing.assert_allclose(
            out[:, i], wanted[c_rows[:, i], IN_GROUP * 2 + (i & 1)], rtol=0, atol=1e-4
        )  # 17 sums of numbers up to 10 in fp32, which tensor cores cut off: 17 * 2^-23 * 10


def test_operand_recipes_of_the_header_make_an_attention_step(run_both: Run) -> None:
    rng = np.random.default_rng(2)
    q, k, v = (to_bf16(rng.standard_normal((16, 16))) for _ in range(3))
    out = run_both(layout("attend"), q, k, v, np.zeros((16, 16), np.float32), shared_bytes=1536)[3]
    scores = round_to_bf16(to_float(q) @ to_float(k).T)
    # Scores up to 30, a unit in bf16's last place where sums in another order round apart.
    np.testing.assert_allclose(out, scores @ to_float(v), rtol=0, atol=2**-8 * 30)


def test_cp_async_copies_16_bytes_or_makes_them_zero(run_both: Run) -> None:
    source = np.arange(128, dtype=np.uint32).reshape(32, 4) + 1
    out = run_both(layout("copy"), source, np.zeros((32, 4), np.uint32), shared_bytes=512)[1]
    wanted = np.where(LANES[:, None] % 2 == 0, source, 0)[::-1]
    np.testing.assert_array_equal(out, wanted)


def test_shuffles_and_reductions_read_the_lanes_they_name(run_both: Run) -> None:
    values = np.random.default_rng(3).integers(-50, 50, 32).astype(np.float32)
    out = run_both(layout("exchange"), values, np.zeros((32, 10), np.float32))[1]
    quads = values.reshape(8, 4)
    wanted = [
        np.full(32, values[5]),
        values[LANES // 8 * 8 + (LANES + 1) % 8],
        values[LANES ^ 3],
        values[np.where(LANES >= 2, LANES - 2, LANES)],
        values[np.where(LANES % 16 < 14, LANES + 2, LANES)],
        np.full(32, values.sum()),
        np.full(32, values.max()),
        quads.sum(axis=1).repeat(4),
        quads.max(axis=1).repeat(4),
        np.where(LANES < 16, values[3], values[20]),
    ]
    np.testing.assert_array_equal(out.T, wanted)


def test_votes_and_bit_counts_agree_with_numpy(run_both: Run) -> None:
    values = np.random.default_rng(4).integers(1, 900, 32).astype(np.uint32)
    out = run_both(layout("vote"), values, np.zeros((32, 5), np.uint32))[1]
    ballot = int(((values & 1) << LANES).sum())
    assert set(out[:, 0]) == {ballot}
    assert set(out[:, 1]) == {int((values == 7).any())}
    assert set(out[:, 2]) == {1}
    assert set(out[:, 3]) == {values.sum()}
    first_bit = [(int(v) & -int(v)).bit_length() for v in values]
    leading = [32 - int(v).bit_length() for v in values]
    counts = ballot.bit_count() * 10000 + np.array(first_bit) * 100 + np.array(leading)
    np.testing.assert_array_equal(out[:, 4], counts)


@pytest.fixture
def converted(run_both: Run) -> tuple[np.ndarray, ...]:
    """Inputs and outputs of `convert`: ties and ordinary floats, every half."""
    rng = np.random.default_rng(5)
    count = 65536
    bits = (rng.integers(0x3000, 0x4800, count) << 16 | 0x8000).astype(np.uint32)  # all ties
    values = np.where(np.arange(count) % 2, bits.view(np.float32), rng.standard_normal(count) * 30)
    values = values.astype(np.float32)
    halves = np.arange(count, dtype=np.uint32).astype(np.uint16)
    unset = [np.zeros(count, np.uint32) for _ in range(2)]
    floats = [np.zeros(count, np.float32) for _ in range(2)]
    args = (values, halves, *unset, *floats, np.int32(count))
    return tuple(run_both(layout("convert"), *args, block=256, grid=(count // 256,)))


def test_bf16_conversion_rounds_ties_to_even(converted: tuple[np.ndarray, ...]) -> None:
    values, _, bits, packed, *_ = converted
    np.testing.assert_array_equal(bits, to_bf16(values))
    np.testing.assert_array_equal(packed, pairs(to_bf16(values), to_bf16(values[::-1])))


def test_every_half_converts_exactly(converted: tuple[np.ndarray, ...]) -> None:
    _, halves, _, _, wide, _ = converted
    np.testing.assert_array_equal(wide, halves.view(np.float16).astype(np.float32))


def test_exp2_is_within_two_units_in_the_last_place(converted: tuple[np.ndarray, ...]) -> None:
    values, powers = converted[0], converted[5]
    normal = np.abs(values) < 126
    wanted = np.exp2(values[normal].astype(np.float64))
    assert np.abs(powers[normal] / wanted - 1).max() <= 2.0**-22
    assert (powers[values < -127] == 0).all()
