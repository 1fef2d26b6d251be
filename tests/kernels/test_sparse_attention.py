"""The reference's attention over block lists, against attention that knows of no blocks."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.reference import (
    BlockLists,
    BlockRule,
    block_mass,
    block_mean,
    block_score,
    block_select,
    dense_attention,
    sparse_attention,
)
from tests.kernels.inputs import Array, structured_qkv

BLOCK, SCALE = 128, 0.125
RULE = BlockRule(alpha=0.1, sink_blocks=1, window_blocks=2, last_full_blocks=1)


def lists_of(q: Array, k: Array, rule: BlockRule) -> BlockLists:
    scores = block_score(q, block_mean(k, BLOCK), block_tokens=BLOCK, scale=SCALE)
    return block_select(block_mass(*scores), rule)


def position_by_position(
    q: Array, k: Array, v: Array, lists: BlockLists, *, correct: bool
) -> np.ndarray:
    """Each query over the keys it may see; a pruned block's keys all become its mean, or nothing.

    |B| copies of the mean key are what the correction stands for, so this is the definition without
    its algebra.
    """
    num_heads, num_tokens, _ = q.shape
    k_mean, v_mean = block_mean(k, BLOCK), block_mean(v, BLOCK)
    out = np.zeros(q.shape)
    for head, i in np.ndindex(num_heads, num_tokens):
        kv_head = head // (num_heads // k.shape[0])
        keys, values = k[kv_head, : i + 1].astype(float), v[kv_head, : i + 1].astype(float)
        seen = np.ones(i + 1, dtype=bool)
        for block in set(range(i // BLOCK)) - set(lists.row(head, i // BLOCK).tolist()):
            inside = slice(block * BLOCK, (block + 1) * BLOCK)
            keys[inside], values[inside] = k_mean[kv_head, block], v_mean[kv_head, block]
            seen[inside] = correct
        weights = np.exp(SCALE * (keys @ q[head, i].astype(float))) * seen
        out[head, i] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 600])
def test_every_block_listed_is_dense_attention(num_tokens: int) -> None:
    q, k, v = structured_qkv(num_tokens, seed=30)
    lists = lists_of(q, k, BlockRule(alpha=0.0, max_density=1.0))
    sparse = sparse_attention(q, k, v, lists, block_tokens=BLOCK, scale=SCALE)
    np.testing.assert_allclose(sparse, dense_attention(q, k, v, scale=SCALE), atol=1e-12)


@pytest.mark.parametrize("correct", [True, False])
def test_pruned_blocks_are_stood_for_by_their_means(correct: bool) -> None:
    q, k, v = structured_qkv(1000, seed=31)
    lists = lists_of(q, k, RULE)
    assert 0.3 < lists.density < 0.9
    means = (block_mean(k, BLOCK), block_mean(v, BLOCK)) if correct else (None, None)
    sparse = sparse_attention(
        q, k, v, lists, block_tokens=BLOCK, scale=SCALE, k_mean=means[0], v_mean=means[1]
    )
    expected = position_by_position(q, k, v, lists, correct=correct)
    np.testing.assert_allclose(sparse, expected, atol=1e-10)


def test_the_correction_brings_sparse_attention_nearer_to_dense() -> None:
    q, k, v = structured_qkv(2000, seed=32)
    lists = lists_of(q, k, RULE)
    dense = dense_attention(q, k, v, scale=SCALE)
    means = {"k_mean": block_mean(k, BLOCK), "v_mean": block_mean(v, BLOCK)}
    without = sparse_attention(q, k, v, lists, block_tokens=BLOCK, scale=SCALE)
    with_means = sparse_attention(q, k, v, lists, block_tokens=BLOCK, scale=SCALE, **means)
    assert np.abs(with_means - dense).mean() < 0.7 * np.abs(without - dense).mean()


def test_a_position_never_sees_a_later_one() -> None:
    q, k, v = structured_qkv(300, seed=33)
    lists = lists_of(q, k, BlockRule(alpha=0.0, max_density=1.0))
    before = sparse_attention(q, k, v, lists, block_tokens=BLOCK, scale=SCALE)
    k[:, 200:], v[:, 200:] = 9.0, -9.0
    after = sparse_attention(q, k, v, lists, block_tokens=BLOCK, scale=SCALE)
    assert np.array_equal(before[:, :200], after[:, :200])
    assert not np.allclose(before[:, 200:], after[:, 200:])
