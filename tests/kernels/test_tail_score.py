"""Scores of the asking queries: softmax, pool, running maximum, panel, chunks."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.reference import attention_rows, average_pool, chunk_mean, chunk_sum, tail_score
from tests.kernels.inputs import structured_qkv


@pytest.mark.parametrize("num_tokens", [1, 5, 127, 700])
def test_attention_rows_are_the_causal_softmax_of_each_query(num_tokens: int) -> None:
    q, k, _ = structured_qkv(num_tokens, seed=40)
    positions = np.array(sorted({0, num_tokens // 2, num_tokens - 1}))
    rows = attention_rows(q[:, positions], k, positions, scale=0.125)
    for head, query in np.ndindex(4, positions.size):
        position = positions[query]
        logits = 0.125 * (k[head // 2, : position + 1].astype(float) @ q[head, position])
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(
            rows[head, query, : position + 1], weights / weights.sum(), rtol=1e-4, atol=1e-9
        )
        assert not rows[head, query, position + 1 :].any()


def test_a_query_past_the_prompt_sees_every_key() -> None:
    q, k, _ = structured_qkv(64, seed=41)
    rows = attention_rows(q[:, :2], k, np.array([64, 1000]), scale=0.125)
    assert (rows > 0).all()
    np.testing.assert_allclose(rows.sum(axis=-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "kernel"), [(40, 13), (40, 1), (5, 13), (1, 13), (13, 3)])
def test_average_pool_counts_zeros_past_the_ends(num_tokens: int, kernel: int) -> None:
    values = np.random.default_rng(42).random((2, num_tokens), dtype=np.float32)
    half = kernel // 2
    padded = np.pad(values, ((0, 0), (half, half)))
    expected = np.stack([padded[:, i : i + num_tokens] for i in range(kernel)]).mean(axis=0)
    np.testing.assert_allclose(average_pool(values, kernel), expected, rtol=1e-6)


def test_scores_pool_each_row_before_the_maximum_over_heads_and_layers() -> None:
    """Two heads that spike at neighbouring keys: pooled first, the spikes do not add up."""
    keys = np.zeros((2, 100, 4), dtype=np.float32)
    keys[0, 50, 0] = keys[1, 51, 0] = 1.0
    queries = np.zeros((2, 1, 4), dtype=np.float32)
    queries[:, 0, 0] = 40.0
    running = np.zeros((1, 100), dtype=np.float32)
    tail_score(queries, keys, np.array([99]), running, scale=1.0, pool_kernel=13)
    np.testing.assert_allclose(running[0, 45:56], 1 / 13, rtol=1e-5)
    np.testing.assert_allclose(running[0, [44, 57]], 1 / 13, rtol=1e-5)
    assert running[0, :44].max() < 1e-6 and running[0, 58:].max() < 1e-6
    # A second layer with flat attention changes the maximum only where it is the larger.
    tail_score(0 * queries, keys, np.array([99]), running, scale=1.0, pool_kernel=13)
    np.testing.assert_allclose(running[0, [20, 50]], [0.01, 1 / 13], rtol=1e-5)


def test_panel_rows_are_the_mean_over_heads_of_unpooled_mass() -> None:
    q, k, _ = structured_qkv(300, seed=43)
    positions = np.array([290, 299])
    running = np.zeros((2, 300), dtype=np.float32)
    panel = tail_score(q[:, positions], k, positions, running, scale=0.125, pool_kernel=13)
    rows = attention_rows(q[:, positions], k, positions, scale=0.125)
    np.testing.assert_allclose(panel, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(panel.sum(axis=1), 1.0, atol=1e-5)


def test_a_short_last_chunk_is_averaged_over_its_own_tokens() -> None:
    values = np.arange(70, dtype=np.float32)[None]
    assert chunk_mean(values, 32).tolist() == [[15.5, 47.5, 66.5]]
    assert chunk_sum(values, 32).tolist() == [[496.0, 1520.0, 399.0]]
