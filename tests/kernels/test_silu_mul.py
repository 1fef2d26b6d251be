"""The gate kernel against float64, to the rounding of its bf16 output; the up half stays."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.device import Device
from kernels.errors import InvalidArgument
from kernels.ops.silu_mul import silu_mul
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.on_device import Arrays, from_bf16, to_bf16

# bf16 rounding (2^-8 of the value), fp32 arithmetic, and the fast exponential's 2 ulp at |x| < 90.
TOLERANCE = 2.0**-8 + 2e-5


def gated(device: Device, gate_up: np.ndarray, ffn: int) -> np.ndarray:
    """Run on bf16 bits [num_rows, 2 * ffn]; the up half must come back as it was."""
    with Arrays(device) as arrays:
        address = arrays.put(gate_up)
        silu_mul(device, gate_up=address, num_rows=gate_up.shape[0], ffn=ffn)
        got = arrays.get(address, gate_up.shape, np.uint16)
    assert np.array_equal(got[:, ffn:], gate_up[:, ffn:])
    return from_bf16(got[:, :ffn])


def worst_error(device: Device, num_rows: int, ffn: int) -> float:
    rng = np.random.default_rng(62)
    gate_up = to_bf16(4 * rng.standard_normal((num_rows, 2 * ffn)))
    gate, up = np.split(from_bf16(gate_up).astype(np.float64), 2, axis=1)
    exact = gate / (1 + np.exp(-gate)) * up
    return float((np.abs(gated(device, gate_up, ffn) - exact) / np.abs(exact)).max())


@pytest.mark.parametrize(("num_rows", "ffn"), [(1, 64), (7, 448), (4, 3072), (5, 2056)])
def test_gate_half_becomes_silu_times_up(device: Device, num_rows: int, ffn: int) -> None:
    assert worst_error(device, num_rows, ffn) < TOLERANCE


def test_extremes_are_finite(device: Device) -> None:
    gate = np.array([-3e38, -200, -100, -88, 0, 88, 200, 1e30], dtype=np.float32)
    gate_up = np.concatenate([to_bf16(gate), to_bf16(np.full(8, 2.0))])[None]
    got = gated(device, gate_up, 8)[0]
    assert np.isfinite(got).all()
    assert np.abs(got[:5]).max() < 1e-35  # exp(-88) * 88 * 2 = 1e-36
    np.testing.assert_allclose(got[5:], 2 * from_bf16(to_bf16(gate[5:])), rtol=2.0**-8)


def test_unwritten_tail_is_seen() -> None:
    edit = Edit("silu_mul.cu", "column < ffn;", "column + VECTOR < ffn;")
    assert worst_error(EmulatedDevice(edits=[edit]), 5, 64) > TOLERANCE


def test_width_of_no_whole_vectors_is_refused(device: Device) -> None:
    with pytest.raises(InvalidArgument, match="ffn must be a multiple of 8, got 60"):
        silu_mul(device, gate_up=16, num_rows=1, ffn=60)
