"""Norm, rotation and gate of the reference, against their definitions in float64."""

from __future__ import annotations

import math

import numpy as np

from kernels.reference import RopeScaling, apply_rope, rmsnorm, rope_tables, silu_mul
from kernels.reference.rope import rope_frequencies


def test_rmsnorm_divides_by_the_root_mean_square() -> None:
    rng = np.random.default_rng(50)
    x = rng.standard_normal((3, 5, 64)).astype(np.float32)
    weight = rng.standard_normal(64).astype(np.float32)
    exact = x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(rmsnorm(x, weight, 1e-6), exact, rtol=1e-5)


def test_rope_turns_component_i_with_component_i_plus_half() -> None:
    x = np.random.default_rng(51).standard_normal((2, 7, 8)).astype(np.float32)
    cosine, sine = rope_tables(np.arange(7), 8, 100.0)
    turned = apply_rope(x, cosine, sine)
    for position, pair in np.ndindex(7, 4):
        angle = position * 100.0 ** (-2 * pair / 8)
        z = (x[:, position, pair] + 1j * x[:, position, pair + 4]) * np.exp(1j * angle)
        np.testing.assert_allclose(turned[:, position, pair], z.real, atol=1e-5)
        np.testing.assert_allclose(turned[:, position, pair + 4], z.imag, atol=1e-5)


def test_rope_angles_stay_exact_at_long_positions() -> None:
    cosine, sine = rope_tables(np.array([131_071]), 64, 1e6)
    assert abs(float(cosine[0, 0]) - math.cos(131_071.0)) < 1e-7
    assert abs(float(sine[0, 0]) - math.sin(131_071.0)) < 1e-7


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    scaling = RopeScaling("yarn", factor=4.0, original_context=32_768)
    plain, one = rope_frequencies(128, 1e6, RopeScaling())
    yarn, magnitude = rope_frequencies(128, 1e6, scaling)
    turns = 32_768 * plain / (2 * math.pi)
    assert np.array_equal(yarn[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(yarn[turns < 0.9], plain[turns < 0.9] / 4, rtol=1e-12)
    assert one == 1.0
    assert magnitude == 1 + 0.1 * math.log(4)


def test_silu_mul_is_finite_at_both_extremes() -> None:
    gate = np.array([-200.0, -1.0, 0.0, 1.0, 200.0], dtype=np.float32)
    out = silu_mul(gate, np.full(5, 2.0, dtype=np.float32))
    np.testing.assert_allclose(out, [0.0, -0.5378828, 0.0, 1.4621172, 400.0], rtol=1e-6)
