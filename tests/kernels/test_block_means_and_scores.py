"""Block means and block scores of the reference, against sums written out position by position."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.reference import block_mass, block_mean, block_score, round_to_bf16
from tests.kernels.inputs import structured_qkv

BLOCK = 128


def test_bf16_rounds_to_nearest_and_ties_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, 1.005, -3.3, 0.0], dtype=np.float32)
    rounded = [1.0, 1.0, 1.015625, 1.0078125, -3.296875, 0.0]
    assert round_to_bf16(values).tolist() == rounded


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 300])
def test_block_mean_averages_the_real_tokens_of_each_block(num_tokens: int) -> None:
    _, k, _ = structured_qkv(num_tokens, seed=20)
    means = block_mean(k, BLOCK)
    assert means.shape == (2, -(-num_tokens // BLOCK), 64)
    for block in range(means.shape[1]):
        exact = k[:, block * BLOCK : (block + 1) * BLOCK].astype(np.float64).mean(axis=1)
        # bf16 keeps 8 significant bits: rounding moves a value by at most 2^-8 of itself.
        assert np.all(np.abs(means[:, block] - exact) <= 2.0**-8 * np.abs(exact) + 1e-6)
        assert np.array_equal(means[:, block], round_to_bf16(means[:, block]))


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 700])
def test_block_mass_sums_exp_over_the_positions_past_each_block(num_tokens: int) -> None:
    q, k, _ = structured_qkv(num_tokens, seed=21)
    k_mean = block_mean(k, BLOCK)
    mass = block_mass(*block_score(q, k_mean, block_tokens=BLOCK, scale=0.125))
    num_blocks = k_mean.shape[1]
    for head, tile in np.ndindex(4, num_blocks):
        expected = np.zeros(num_blocks)
        rows = range(tile * BLOCK, min((tile + 1) * BLOCK, num_tokens))
        for block in range(tile + 1):
            last_token = min((block + 1) * BLOCK, num_tokens) - 1
            for i in rows:
                if i >= last_token:
                    logit = 0.125 * float(np.dot(q[head, i], k_mean[head // 2, block]))
                    expected[block] += np.exp(logit)
        # Any common factor of a row is free: compare the rows' shapes.
        np.testing.assert_allclose(
            mass[head, tile] / mass[head, tile].max(), expected / expected.max(), rtol=1e-5
        )


def test_block_mass_ranks_a_strong_block_above_a_uniform_one() -> None:
    """Without the rescale a block scores how evenly it is liked, not how much."""
    q = np.zeros((1, 384, 64), dtype=np.float32)
    q[0, :, 0] = 8.0
    q[0, 256, 1] = 80.0  # one query of the last tile likes block 1 far more than anything else
    k = np.zeros((1, 384, 64), dtype=np.float32)
    k[0, 128:256, 1] = 1.0
    maxima, sums = block_score(q, block_mean(k, BLOCK), block_tokens=BLOCK, scale=0.125)
    mass = block_mass(maxima, sums)
    assert sums[0, 2, 0] > sums[0, 2, 1]
    assert mass[0, 2, 1] > 10 * mass[0, 2, 0]
