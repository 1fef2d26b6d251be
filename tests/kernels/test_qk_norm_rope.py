"""Bias, head norm and rotation against float64, at positions up to 262,143."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from kernels.device import Device
from kernels.errors import InvalidArgument
from kernels.ops.qk_norm_rope import frequency_turns, qk_norm_rope
from kernels.reference import RopeScaling, apply_rope, rmsnorm, rope_tables
from kernels.reference.rope import rope_frequencies
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.on_device import Arrays, from_bf16, to_bf16

EPSILON = 1e-6
BASE = 1e6
PLAIN = RopeScaling()
YARN = RopeScaling("yarn", factor=6.4, original_context=40_960)
LINEAR = RopeScaling("linear", factor=3.0)


@dataclass(frozen=True)
class Case:
    """One model's heads over some rows."""

    num_rows: int = 5
    head_dim: int = 64
    heads: tuple[int, int, int] = (6, 2, 2)  # query, key, value
    norm: bool = False
    bias: bool = False
    first_position: int = 0
    gathered: bool = False
    scaling: RopeScaling = field(default=PLAIN)
    divided: bool = False  # Llama 3's frequency divisors

    @property
    def width(self) -> int:
        return sum(self.heads) * self.head_dim

    @property
    def positions(self) -> np.ndarray:
        rows = np.arange(self.num_rows)
        return 262_143 - 7 * rows**2 if self.gathered else self.first_position + rows

    @property
    def divisors(self) -> np.ndarray | None:
        if not self.divided:
            return None
        return np.geomspace(1, 32, self.head_dim // 2).astype(np.float32)


@dataclass(frozen=True)
class Inputs:
    """Rows with 8 columns to spare, that must stay as they are, and the parameters."""

    qkv: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    bias: np.ndarray


def drawn(case: Case) -> Inputs:
    rng = np.random.default_rng(66)
    return Inputs(
        to_bf16(rng.standard_normal((case.num_rows, case.width + 8))),
        rng.uniform(0.5, 2, case.head_dim).astype(np.float32),
        rng.uniform(0.5, 2, case.head_dim).astype(np.float32),
        rng.standard_normal(case.width).astype(np.float32),
    )


def exact(case: Case, given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Float64 results [num_rows, width], and how large each rotated pair is."""
    num_q, num_k, _ = case.heads
    x = from_bf16(given.qkv[:, : case.width]).astype(np.float64)
    x = (x + given.bias if case.bias else x).reshape(case.num_rows, -1, case.head_dim)
    turned, values = x[:, : num_q + num_k], x[:, num_q + num_k :]
    if case.norm:
        norms = np.concatenate(
            [np.tile(given.q_norm, (num_q, 1)), np.tile(given.k_norm, (num_k, 1))]
        )
        root = np.sqrt((turned**2).mean(-1, keepdims=True) + EPSILON)
        turned = turned / root * norms
    frequencies, magnitude = rope_frequencies(case.head_dim, BASE, case.scaling, case.divisors)
    angles = (case.positions[:, None] * frequencies)[:, None]
    half = case.head_dim // 2
    z = (turned[..., :half] + 1j * turned[..., half:]) * magnitude * np.exp(1j * angles)
    rotated = np.concatenate([z.real, z.imag], axis=-1)
    size = np.concatenate([np.abs(z), np.abs(z)], axis=-1)
    both = [np.concatenate([part, values], axis=1) for part in (rotated, size)]
    both[1][:, num_q + num_k :] = np.abs(values)
    return both[0].reshape(case.num_rows, -1), both[1].reshape(case.num_rows, -1)


def run(device: Device, case: Case) -> tuple[Inputs, np.ndarray]:
    given = drawn(case)
    frequencies, magnitude = rope_frequencies(case.head_dim, BASE, case.scaling, case.divisors)
    num_q, num_k, num_v = case.heads
    with Arrays(device) as arrays:
        qkv = arrays.put(given.qkv)
        qk_norm_rope(
            device,
            qkv=qkv,
            row_stride=case.width + 8,
            num_rows=case.num_rows,
            head_dim=case.head_dim,
            num_q=num_q,
            num_k=num_k,
            num_v=num_v,
            turns=arrays.put(frequency_turns(frequencies)),
            magnitude=magnitude,
            first_position=case.first_position,
            positions=arrays.put(case.positions.astype(np.int32)) if case.gathered else 0,
            q_norm=arrays.put(given.q_norm) if case.norm else 0,
            k_norm=arrays.put(given.k_norm) if case.norm else 0,
            bias=arrays.put(given.bias) if case.bias else 0,
            epsilon=EPSILON,
        )
        got = arrays.get(qkv, given.qkv.shape, np.uint16)
    assert np.array_equal(got[:, case.width :], given.qkv[:, case.width :])
    return given, from_bf16(got[:, : case.width])


def worst_error(device: Device, case: Case) -> float:
    """Largest error as a share of what rounding may move a component by."""
    given, got = run(device, case)
    expected, size = exact(case, given)
    # bf16: 2^-8 of the value. Angle, sine, cosine and fp32 products: 2e-6 of the pair's size.
    return float((np.abs(got - expected) / (2.0**-8 * np.abs(expected) + 2e-6 * size)).max())


QWEN3 = Case(norm=True)
QWEN2 = Case(bias=True, heads=(7, 1, 1))


@pytest.mark.parametrize("num_rows", [1, 127, 129])
def test_heads_are_normalised_and_turned_to_their_positions(device: Device, num_rows: int) -> None:
    assert worst_error(device, Case(num_rows, norm=True)) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [4_095, 8_193])
def test_heads_of_longer_prompts(cuda_device: Device, num_rows: int) -> None:
    case = Case(num_rows, 128, norm=True, bias=True, first_position=250_000, scaling=YARN)
    assert worst_error(cuda_device, case) <= 1


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("case", [QWEN3, QWEN2, Case()], ids=["norm", "bias", "neither"])
def test_heads_of_each_width_and_architecture(device: Device, case: Case, head_dim: int) -> None:
    case = Case(9, head_dim, case.heads, norm=case.norm, bias=case.bias, first_position=1_000)
    assert worst_error(device, case) <= 1


@pytest.mark.parametrize(
    ("scaling", "divided"),
    [(PLAIN, False), (YARN, False), (LINEAR, False), (PLAIN, True)],
    ids=["plain", "yarn", "linear", "llama3"],
)
def test_angles_are_exact_at_the_longest_context(
    device: Device, scaling: RopeScaling, divided: bool
) -> None:
    """A float32 angle would be off by 0.008 radians here: 4,000 times the tolerance."""
    case = Case(9, norm=True, first_position=262_135, scaling=scaling, divided=divided)
    assert worst_error(device, case) <= 1


@pytest.mark.parametrize("heads", [(4, 0, 0), (0, 2, 0)], ids=["queries alone", "keys alone"])
def test_rows_may_hold_some_heads_at_given_positions(
    device: Device, heads: tuple[int, int, int]
) -> None:
    case = Case(11, heads=heads, norm=True, bias=True, gathered=True)
    assert worst_error(device, case) <= 1


def test_result_is_the_references_to_one_rounding(device: Device) -> None:
    case = Case(9, 128, norm=True, bias=True, first_position=131_000, scaling=YARN)
    given, got = run(device, case)
    num_q, num_k, _ = case.heads
    x = (from_bf16(given.qkv[:, : case.width]) + given.bias).reshape(9, -1, case.head_dim)
    norms = np.concatenate([np.tile(given.q_norm, (num_q, 1)), np.tile(given.k_norm, (num_k, 1))])
    cosine, sine = rope_tables(case.positions, case.head_dim, BASE, YARN)
    turned = rmsnorm(x[:, : num_q + num_k], norms, EPSILON)
    x[:, : num_q + num_k] = apply_rope(turned, cosine[:, None], sine[:, None])
    bits = to_bf16(x.reshape(9, -1)), to_bf16(got)
    steps = np.abs(bits[0].astype(np.int32) - bits[1].astype(np.int32))
    assert steps[np.abs(x.reshape(9, -1)) > 1e-3].max() <= 1
    assert (steps == 0).mean() > 0.99


@pytest.mark.parametrize(
    ("old", "new", "case"),
    [
        (
            "if (norm) {\n        const float scale",
            "if (false) {\n        const float scale",
            QWEN3,
        ),
        ("      if (bias) {", "      if (false) {", QWEN2),
        ("if (bias && real_row) add_bias", "if (false) add_bias", QWEN2),
        ("if (head + u >= count) break;", "if (head + u + 1 >= count) break;", Case()),
        ("k_norm ? k_norm + column", "k_norm ? q_norm + column", QWEN3),
        (
            "static_cast<float>(static_cast<int>(fraction >> 32)) * RADIANS_PER_STEP",
            "static_cast<float>(position) * (static_cast<float>(turns[i]) * 3.4061216e-19f)",
            Case(first_position=131_072),
        ),
    ],
    ids=[
        "no norm",
        "no bias",
        "no bias on values",
        "unwritten head",
        "queries' norm for keys",
        "float32 angle",
    ],
)
def test_defect_is_seen(old: str, new: str, case: Case) -> None:
    device = EmulatedDevice(edits=[Edit("qk_norm_rope.cu", old, new)])
    assert worst_error(device, case) > 1


def test_turns_keep_the_fraction_of_a_turn_at_any_position() -> None:
    frequencies = rope_frequencies(128, BASE, PLAIN)[0]
    turns = frequency_turns(frequencies)
    for position in (1, 40_961, 262_143):
        fraction = (turns * np.uint64(position)).astype(np.float64) / 2.0**64
        angle = 2 * math.pi * fraction
        expected = np.exp(1j * position * frequencies)
        # float64 itself carries 2^-53 of up to 262,143 radians: 3e-11.
        np.testing.assert_allclose(np.exp(1j * angle), expected, atol=1e-10)


def test_turns_of_a_whole_turn_and_more_keep_their_fraction() -> None:
    turns = frequency_turns(2 * math.pi * np.array([0.0, 0.5, 1.0, 1.25]))
    assert turns.tolist() == [0, 1 << 63, 0, 1 << 62]


def test_row_too_short_for_its_heads_is_refused(device: Device) -> None:
    with pytest.raises(InvalidArgument, match="row_stride must be at least 192, got 128"):
        qk_norm_rope(
            device,
            qkv=16,
            row_stride=128,
            num_rows=1,
            head_dim=64,
            num_q=1,
            num_k=1,
            num_v=1,
            turns=16,
            magnitude=1.0,
        )
