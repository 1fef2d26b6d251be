"""The CPU drafter's forward pass against llama.cpp on the same random float32 weights.

Tolerance: 1e-3 of the largest logit. Both sides compute in float32 over at most 128 products a
sum and 3 layers, which gives about 1e-5; a wrong rope, norm, mask or head map gives above 0.1.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from drafter_svc.architecture import load_weights, scaling_for
from drafter_svc.backend import AttentionConfig
from drafter_svc.cpu_forward import CpuForward
from drafter_svc.cpu_pool import WorkPool
from drafter_svc.layer_math import logits
from modelfile.gguf_file import GgufFile
from tests.fixtures.llama_logits import llama_logits
from tests.fixtures.tiny_gguf import write_tiny_gguf

NUM_TOKENS = 300  # three blocks, the last one ragged
TOLERANCE = 1e-3


def prompt(seed: int, num_tokens: int = NUM_TOKENS, vocab: int = 640) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, vocab, num_tokens).astype(np.int32)


def our_logits(
    path: Path, ids: NDArray[np.int32], attention: AttentionConfig | None = None
) -> NDArray[np.float32]:
    with GgufFile.open(path) as file:
        weights = load_weights(file)
    pool = WorkPool(2)
    try:
        scaling = scaling_for(weights.shape, ids.size)
        stop = threading.Event()
        forward = CpuForward(weights, ids, scaling, attention or AttentionConfig(), pool, stop)
        for index in range(weights.shape.layers):
            forward.project_layer(index)
            forward.finish_layer(index)
        return logits(forward.x, weights)
    finally:
        pool.close()


def worst_relative(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (4, 1)])
def test_forward_equals_llama_cpp(tmp_path: Path, arch: str, heads: int, kv_heads: int) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        arch=arch,
        layers=3,
        embed=32 * heads,
        heads=heads,
        kv_heads=kv_heads,
        seed=1,
        qk_gain=2.0,
        tie_embeddings=arch != "llama",
    )
    ids = prompt(seed=2)
    assert worst_relative(our_logits(path, ids), llama_logits(path, ids)) < TOLERANCE


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
def test_forward_follows_the_yarn_keys_of_the_file(tmp_path: Path, arch: str) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        arch=arch,
        embed=128,
        seed=3,
        qk_gain=2.0,
        rope_freq_base=1e4,
        context_length=512,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_context": 128},
    )
    ids = prompt(seed=4)
    assert worst_relative(our_logits(path, ids), llama_logits(path, ids)) < TOLERANCE


def test_forward_switches_yarn_on_past_the_trained_context(tmp_path: Path) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf", seed=5, qk_gain=2.0, rope_freq_base=1e4, context_length=200
    )
    ids = prompt(seed=6)
    theirs = llama_logits(path, ids, yarn_factor=NUM_TOKENS / 200, yarn_original_context=200)
    assert worst_relative(our_logits(path, ids), theirs) < TOLERANCE


def test_forward_divides_positions_by_the_linear_factor_of_the_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        seed=7,
        qk_gain=2.0,
        rope_freq_base=1e4,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    ids = prompt(seed=8)
    assert worst_relative(our_logits(path, ids), llama_logits(path, ids)) < TOLERANCE


def test_forward_divides_the_frequencies_by_the_llama_3_table(tmp_path: Path) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        arch="llama",
        seed=9,
        qk_gain=2.0,
        rope_freq_base=1e4,
        rope_freqs=np.linspace(1.0, 8.0, 16),
    )
    ids = prompt(seed=10)
    assert worst_relative(our_logits(path, ids), llama_logits(path, ids)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["Q8_0", "F16", "BF16"])
def test_forward_takes_quantised_weights(tmp_path: Path, dtype: str) -> None:
    """llama.cpp quantises activations beside Q8_0 weights and rounds them beside 16-bit ones."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=11, dtype=dtype)
    ids = prompt(seed=12)
    assert worst_relative(our_logits(path, ids), llama_logits(path, ids)) < 0.05


def test_alpha_zero_with_max_density_one_equals_dense_attention(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=13, qk_gain=2.0)
    ids = prompt(seed=14, num_tokens=1300)
    everything = AttentionConfig(alpha=0.0, max_density=1.0, dense_below_tokens=0)
    dense = our_logits(path, ids, AttentionConfig(dense_below_tokens=1301))
    assert worst_relative(our_logits(path, ids, everything), dense) < 1e-5


def test_sparse_attention_differs_from_dense_when_blocks_are_pruned(tmp_path: Path) -> None:
    """Guards the test above: at these settings pruning does happen."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=13, qk_gain=2.0)
    ids = prompt(seed=14, num_tokens=1300)
    sparse = AttentionConfig(alpha=1.0, dense_below_tokens=0, last_full_blocks=0)
    dense = our_logits(path, ids, AttentionConfig(dense_below_tokens=1301))
    assert worst_relative(our_logits(path, ids, sparse), dense) > 1e-3
