"""The norm kernel against float64, to the rounding of its bf16 output."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.device import Device
from kernels.errors import InvalidArgument
from kernels.ops.rmsnorm import rmsnorm
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.on_device import Arrays, from_bf16

EPSILON = 1e-6
# Rounding to bf16 moves a value by up to 2^-8 of itself; fp32 arithmetic by under 1e-6.
TOLERANCE = 2.0**-8 + 1e-5


def worst_error(device: Device, num_rows: int, hidden: int, *, gather: bool = False) -> float:
    """Largest relative error, or infinity where something was left unwritten."""
    rng = np.random.default_rng(61)
    x = (rng.standard_normal((num_rows + 3, hidden)) * 5).astype(np.float32)
    weight = rng.standard_normal(hidden).astype(np.float32)
    rows = rng.permutation(num_rows + 3)[:num_rows].astype(np.int32)
    read = x[rows] if gather else x[:num_rows]
    with Arrays(device) as arrays:
        out = arrays.poisoned((num_rows, hidden), np.uint16)
        rmsnorm(
            device,
            x=arrays.put(x if gather else read),
            weight=arrays.put(weight),
            out=out,
            num_rows=num_rows,
            hidden=hidden,
            epsilon=EPSILON,
            rows=arrays.put(rows) if gather else 0,
        )
        got = from_bf16(arrays.get(out, (num_rows, hidden), np.uint16)).astype(np.float64)
    exact = read / np.sqrt((read.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPSILON)
    exact = exact * weight
    error = np.abs(got - exact) / np.abs(exact)
    return float(np.nan_to_num(error, nan=np.inf).max())


@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize("hidden", [64, 1024, 1032, 1536, 2048, 3072, 8192])
def test_rows_have_unit_root_mean_square(device: Device, num_rows: int, hidden: int) -> None:
    assert worst_error(device, num_rows, hidden) < TOLERANCE


@pytest.mark.parametrize("hidden", [192, 2048])
def test_rows_may_be_gathered(device: Device, hidden: int) -> None:
    assert worst_error(device, 9, hidden, gather=True) < TOLERANCE


@pytest.mark.parametrize(
    ("old", "new", "hidden"),
    [
        ("if (row >= num_rows) return;", "if (row + 1 >= num_rows) return;", 64),
        ("squares += partial[slot * WARPS_PER_ROW + p];", "squares += partial[p];", 2048),
    ],
    ids=["unwritten tail", "another row's sum"],
)
def test_defect_is_seen(old: str, new: str, hidden: int) -> None:
    device = EmulatedDevice(edits=[Edit("rmsnorm.cu", old, new)])
    assert worst_error(device, 9, hidden) > TOLERANCE


def test_width_without_a_variant_is_refused(device: Device) -> None:
    with pytest.raises(InvalidArgument, match="hidden must be at most 8192, got 8200"):
        rmsnorm(device, x=16, weight=16, out=16, num_rows=1, hidden=8200, epsilon=EPSILON)
