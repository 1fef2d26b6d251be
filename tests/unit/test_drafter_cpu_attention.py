"""The CPU's tile loop against the float64 reference: the same lists exactly, the same values.

Tolerance: float32 logits of unit scale over 64 products are off by about 1e-6, so weights and the
averages of values of size about 3 by less than 1e-5; asserted at 1e-4.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from drafter_svc.backend import AttentionConfig
from drafter_svc.cpu_attention import LayerBuffers, SparseAttention
from drafter_svc.cpu_pool import WorkPool
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
from skim.errors import Cancelled
from tests.kernels.inputs import Array, structured_qkv

BLOCK, SCALE = 128, 0.125
SPARSE = AttentionConfig(dense_below_tokens=0)
LENGTHS = [1, 127, 128, 129, 4095, 8193]


class Recorded(SparseAttention):
    """Remembers the blocks that each tile read."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: dict[tuple[int, int, int], list[int]] = {}

    def _select(self, q: Array, kv_head: int, tile: int, scratch: Any) -> Any:
        chosen = super()._select(q, kv_head, tile, scratch)
        for head in range(self._buffers.q.shape[0]):
            if np.shares_memory(q, self._buffers.q[head]):
                self.seen[kv_head, head, tile] = chosen[0].tolist()
        return chosen


def attend(
    q: Array, k: Array, v: Array, config: AttentionConfig, *, stale: float = 0.0
) -> tuple[Array, Recorded]:
    """Run the CPU path on unscaled q; `stale` fills the memory past the end."""
    buffers = LayerBuffers(q.shape[1], q.shape[0], k.shape[0], q.shape[2], config.block_tokens)
    buffers.k[...] = stale
    buffers.v[..., :-1] = stale
    buffers.q[...] = q * np.float32(SCALE)
    buffers.keys()[...], buffers.values()[...] = k, v
    buffers.out[...] = np.nan
    pool = WorkPool(2)
    try:
        attention = Recorded(buffers, config, pool)
        attention.run(threading.Event())
    finally:
        pool.close()
    out = buffers.out.reshape(q.shape[1], q.shape[0], q.shape[2]).swapaxes(0, 1)
    return out, attention


def reference_lists(q: Array, k: Array, config: AttentionConfig) -> BlockLists:
    rule = BlockRule(
        config.alpha,
        config.sink_blocks,
        config.window_blocks,
        config.last_full_blocks,
        config.max_density,
    )
    mass = block_mass(*block_score(q, block_mean(k, BLOCK), block_tokens=BLOCK, scale=SCALE))
    # An input with a mass right at the threshold would test rounding, not selection.
    relative = mass / mass.max(axis=-1, keepdims=True)
    assert np.abs(relative[relative > 0] / config.alpha - 1).min(initial=1.0) > 1e-5
    return block_select(mass, rule)


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 1), (4, 2)])
def test_cpu_attention_equals_the_reference(
    num_tokens: int, num_heads: int, num_kv_heads: int
) -> None:
    q, k, v = structured_qkv(
        num_tokens, seed=60 + num_heads, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    out, attention = attend(q, k, v, SPARSE)
    lists = reference_lists(q, k, SPARSE)
    if num_tokens > 4000:
        assert 0.1 < lists.density < 0.5
    for head, tile in np.ndindex(*lists.counts.shape):
        kv_head = head * num_kv_heads // num_heads
        assert attention.seen[kv_head, head, tile] == lists.row(head, tile).tolist()
    assert attention.densities == [lists.density]
    assert attention.cut_rows == int(lists.cut.sum())
    expected = sparse_attention(
        q,
        k,
        v,
        lists,
        block_tokens=BLOCK,
        scale=SCALE,
        k_mean=block_mean(k, BLOCK),
        v_mean=block_mean(v, BLOCK),
    )
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 129, 1000])
def test_memory_past_the_end_is_not_read_and_all_output_is_written(num_tokens: int) -> None:
    q, k, v = structured_qkv(num_tokens, seed=61)
    clean, _ = attend(q, k, v, SPARSE)
    poisoned, _ = attend(q, k, v, SPARSE, stale=1e4)
    assert np.isfinite(poisoned).all()
    assert np.array_equal(poisoned, clean)


def test_no_correction_when_it_is_switched_off() -> None:
    q, k, v = structured_qkv(3000, seed=62)
    config = replace(SPARSE, mean_correction=False)
    lists = reference_lists(q, k, config)
    assert lists.density < 0.7
    expected = sparse_attention(q, k, v, lists, block_tokens=BLOCK, scale=SCALE)
    np.testing.assert_allclose(attend(q, k, v, config)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(dense_below_tokens=2501),
        AttentionConfig(dense_below_tokens=2500, alpha=0.0, max_density=1.0),
        AttentionConfig(dense_below_tokens=0, last_full_blocks=99),
    ],
    ids=["below the dense limit", "alpha 0 and max_density 1", "all tiles full"],
)
def test_attention_is_dense_when_nothing_may_be_pruned(config: AttentionConfig) -> None:
    """2,500 tokens are 20 blocks: more than one piece, so the running maximum is at work too."""
    q, k, v = structured_qkv(2500, seed=63, num_heads=2, num_kv_heads=1)
    out, attention = attend(q, k, v, config)
    assert attention.densities == [1.0] and attention.cut_rows == 0
    np.testing.assert_allclose(out, dense_attention(q, k, v, scale=SCALE), atol=1e-4)


def test_sparse_attention_begins_at_the_dense_limit_itself() -> None:
    q, k, v = structured_qkv(2500, seed=63)
    _, attention = attend(q, k, v, AttentionConfig(dense_below_tokens=2500, alpha=1.0))
    assert attention.densities[0] < 1.0


def test_large_logits_do_not_overflow() -> None:
    q, k, v = structured_qkv(3000, seed=64)
    out, _ = attend(q * 200, k, v, SPARSE)
    assert np.isfinite(out).all()


def test_max_density_bounds_the_work_on_flat_attention() -> None:
    q, k, v = structured_qkv(8192, seed=65, num_heads=2, num_kv_heads=1)
    out, attention = attend(0 * q, k, v, SPARSE)
    rule = BlockRule()
    counts = [min(t + 1, rule.bound(t)) if t < 62 else t + 1 for t in range(64)]
    assert attention.densities == [sum(counts) / (64 * 65 / 2)]
    assert attention.cut_rows == 2 * (62 - 8)
    assert attention.rows == 2 * 64
    # With every weight equal the correction is exact: each row is the mean of what it may see.
    means = np.cumsum(v[0].astype(float), axis=0) / np.arange(1, 8193)[:, None]
    np.testing.assert_allclose(out[0], means, atol=2e-3)  # v means are rounded to bf16


def test_a_stop_ends_the_layer_within_the_blocks_in_flight() -> None:
    q, k, v = structured_qkv(4096, seed=66)
    buffers = LayerBuffers(4096, 4, 2, 64, BLOCK)
    buffers.q[...], buffers.keys()[...], buffers.values()[...] = q, k, v
    stop = threading.Event()
    begun: list[int] = []

    class StopsAtTen(SparseAttention):
        def _piece(self, piece: int, worker: int) -> None:
            begun.append(piece)
            if piece == 10:
                stop.set()
            super()._piece(piece, worker)

    pool = WorkPool(2)
    try:
        with pytest.raises(Cancelled):
            StopsAtTen(buffers, SPARSE, pool).run(stop)
    finally:
        pool.close()
    assert len(begun) <= 10 + 1 + pool.num_threads
