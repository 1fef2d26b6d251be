"""One call of an attention kernel: its inputs, what the reference gives, and how near is right.

Tolerance. Inputs are exact bf16 and sums are fp32, so what separates a kernel from float64 is that
each weight and each output element is rounded to bf16 (by 2^-9 of the power of two below it, so by
less than 2^-8 of itself) over an approximate exp2 (below 2^-12 in all). An element may be off by
2^-8 (sum of weight |v| + |output|) + 2^-12 sum of weight |v|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.planted import plant
from kernels.reference import BlockLists, BlockRule, block_mean, round_to_bf16, sparse_attention
from tests.kernels.inputs import structured_qkv

BLOCK = 128
PADDING = 8  # columns behind V that nothing may read or write

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """Inputs as bf16 values in float32, and what is asked of the kernel."""

    q: Values
    k: Values
    v: Values
    lists: BlockLists | None
    correct: bool

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.q.shape[-1])

    def means(self) -> tuple[Values, Values]:
        return block_mean(self.k, BLOCK), block_mean(self.v, BLOCK)


def make_case(
    num_tokens: int,
    *,
    rule: BlockRule,
    seed: int,
    head_dim: int,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    density: float | None = None,
    correct: bool = True,
) -> Case:
    """Structured inputs; seeded lists of a density, or dense."""
    qkv = structured_qkv(
        num_tokens, seed=seed, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    q, k, v = (round_to_bf16(x) for x in qkv)
    num_tiles = -(-num_tokens // BLOCK)
    lists = None if density is None else plant(density, num_heads, num_tiles, rule, seed=seed)
    return Case(q, k, v, lists, correct)


def all_causal(num_heads: int, num_tiles: int) -> BlockLists:
    """Every causal block listed."""
    return plant(1.0, num_heads, num_tiles, BlockRule(last_full_blocks=num_tiles))


def expected(given: Case) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The reference's output and how far each element may be from it."""
    num_heads, num_tokens, _ = given.q.shape
    lists = given.lists or all_causal(num_heads, -(-num_tokens // BLOCK))
    k_mean, v_mean = given.means() if given.correct else (None, None)

    def run(v: Values, means: Values | None) -> NDArray[np.float64]:
        return sparse_attention(
            given.q,
            given.k,
            v,
            lists,
            block_tokens=BLOCK,
            scale=given.scale,
            k_mean=k_mean,
            v_mean=means,
        )

    reference = run(given.v, v_mean)
    magnitude = run(np.abs(given.v), None if v_mean is None else np.abs(v_mean))
    return reference, 2**-8 * (magnitude + np.abs(reference)) + 2**-12 * magnitude


def excess(out: Values, given: Case) -> float:
    """Largest error over what is allowed; at most 1 where the kernel is right, NaN is infinite."""
    reference, allowed = expected(given)
    ratio = np.abs(out - reference) / allowed
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())
