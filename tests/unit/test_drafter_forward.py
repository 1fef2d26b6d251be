"""The CPU drafter's forward pass against llama.cpp on the same random float32 weights.

Tolerance: 1e-3 of the largest logit. Both sides compute in float32 over at most 128 products a
sum and 3 layers, which gives about 1e-5; a wrong rope, norm, mask or head map gives above 0.1.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from drafter_svc.architecture import DrafterWeights, load_weights, scaling_for
from drafter_svc.backend import AttentionConfig, ScoreInput
from drafter_svc.cpu_backend import CpuBackend
from drafter_svc.cpu_forward import CpuForward
from drafter_svc.cpu_pool import WorkPool
from drafter_svc.layer_math import logits
from drafter_svc.scorers.tally import Tally
from modelfile.gguf_file import GgufFile
from tests.fixtures.llama_logits import llama_logits
from tests.fixtures.tiny_gguf import write_tiny_gguf

NUM_TOKENS = 300  # three blocks, the last one ragged
TOLERANCE = 1e-3


def prompt(seed: int, num_tokens: int = NUM_TOKENS, vocab: int = 640) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, vocab, num_tokens).astype(np.int32)


def load(path: Path) -> DrafterWeights:
    with GgufFile.open(path) as file:
        return load_weights(file)


def start(
    weights: DrafterWeights,
    ids: NDArray[np.int32],
    pool: WorkPool,
    attention: AttentionConfig | None = None,
) -> CpuForward:
    scaling = scaling_for(weights.shape, ids.size)
    stop = threading.Event()
    return CpuForward(weights, ids, scaling, attention or AttentionConfig(), pool, stop)


@pytest.fixture
def pool() -> Iterator[WorkPool]:
    opened = WorkPool(2)
    yield opened
    opened.close()


def our_logits(
    path: Path,
    ids: NDArray[np.int32],
    pool: WorkPool,
    attention: AttentionConfig | None = None,
) -> NDArray[np.float32]:
    weights = load(path)
    forward = start(weights, ids, pool, attention)
    for index in range(weights.shape.layers):
        forward.project_layer(index)
        forward.finish_layer(index)
    return logits(forward.x, weights)


def worst_relative(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (4, 1)])
def test_forward_equals_llama_cpp(
    pool: WorkPool, tmp_path: Path, arch: str, heads: int, kv_heads: int
) -> None:
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
    assert worst_relative(our_logits(path, ids, pool), llama_logits(path, ids)) < TOLERANCE


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
def test_forward_follows_the_yarn_keys_of_the_file(
    pool: WorkPool, tmp_path: Path, arch: str
) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        arch=arch,
        embed=128,
        seed=3,
        qk_gain=2.0,
        rope_freq_base=1e4,
        context_length=4096,
        # 32 turns of 1,024 tokens fall between two frequencies: both ends of the ramp are rounded.
        rope_scaling={"type": "yarn", "factor": 4.0, "original_context": 1024},
    )
    ids = prompt(seed=4)
    assert worst_relative(our_logits(path, ids, pool), llama_logits(path, ids)) < TOLERANCE


def test_forward_switches_yarn_on_past_the_trained_context(pool: WorkPool, tmp_path: Path) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf", seed=5, qk_gain=2.0, rope_freq_base=1e4, context_length=200
    )
    ids = prompt(seed=6)
    theirs = llama_logits(path, ids, yarn_factor=NUM_TOKENS / 200, yarn_original_context=200)
    assert worst_relative(our_logits(path, ids, pool), theirs) < TOLERANCE


def test_forward_divides_positions_by_the_linear_factor_of_the_file(
    pool: WorkPool, tmp_path: Path
) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        seed=7,
        qk_gain=2.0,
        rope_freq_base=1e4,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    ids = prompt(seed=8)
    assert worst_relative(our_logits(path, ids, pool), llama_logits(path, ids)) < TOLERANCE


def test_forward_divides_the_frequencies_by_the_llama_3_table(
    pool: WorkPool, tmp_path: Path
) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        arch="llama",
        seed=9,
        qk_gain=2.0,
        rope_freq_base=1e4,
        rope_freqs=np.linspace(1.0, 8.0, 16),
    )
    ids = prompt(seed=10)
    assert worst_relative(our_logits(path, ids, pool), llama_logits(path, ids)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["Q8_0", "F16", "BF16"])
def test_forward_takes_quantised_weights(pool: WorkPool, tmp_path: Path, dtype: str) -> None:
    """llama.cpp quantises activations beside Q8_0 weights and rounds them beside 16-bit ones."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=11, dtype=dtype)
    ids = prompt(seed=12)
    assert worst_relative(our_logits(path, ids, pool), llama_logits(path, ids)) < 0.05


def test_alpha_zero_with_max_density_one_equals_dense_attention(
    pool: WorkPool, tmp_path: Path
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=13, qk_gain=2.0)
    ids = prompt(seed=14, num_tokens=1300)
    everything = AttentionConfig(alpha=0.0, max_density=1.0, dense_below_tokens=0)
    dense = our_logits(path, ids, pool, AttentionConfig(dense_below_tokens=1301))
    assert worst_relative(our_logits(path, ids, pool, everything), dense) < 1e-5


def test_sparse_attention_differs_from_dense_when_blocks_are_pruned(
    pool: WorkPool, tmp_path: Path
) -> None:
    """Guards the test above: at these settings pruning does happen."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=13, qk_gain=2.0)
    ids = prompt(seed=14, num_tokens=1300)
    sparse = AttentionConfig(alpha=1.0, dense_below_tokens=0, last_full_blocks=0)
    dense = our_logits(path, ids, pool, AttentionConfig(dense_below_tokens=1301))
    assert worst_relative(our_logits(path, ids, pool, sparse), dense) > 1e-3


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
def test_the_last_layers_short_cut_gives_the_same_queries_and_keys(
    pool: WorkPool, tmp_path: Path, arch: str
) -> None:
    weights = load(write_tiny_gguf(tmp_path / "tiny.gguf", arch=arch, embed=128, seed=15))
    whole, short = (start(weights, prompt(seed=16), pool) for _ in range(2))
    whole.project_layer(1)
    short.project_keys(1, 290)
    positions = np.array([3, 280, 299])
    # Products over 128 terms in another blocking: the last bits differ.
    np.testing.assert_allclose(
        short.queries_at(1, positions), whole.buffers.q[:, positions], atol=1e-5
    )
    np.testing.assert_allclose(
        short.buffers.keys()[:, :290], whole.buffers.keys()[:, :290], atol=1e-5
    )


def test_lookahead_asks_with_the_tokens_that_greedy_decoding_writes(
    pool: WorkPool, tmp_path: Path
) -> None:
    """Against one plain pass over the prompt and llama.cpp's own greedy continuation."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=17, qk_gain=2.0, layers=3)
    ids, weights = prompt(seed=18), load(path)
    extended = ids
    for _ in range(3):
        token = llama_logits(path, extended)[-1].argmax()
        extended = np.append(extended, token).astype(np.int32)
    positions = np.arange(NUM_TOKENS - 8, NUM_TOKENS + 3)
    tally = Tally(positions, NUM_TOKENS, 3, chunk_tokens=32, pool_kernel=13)
    forward = start(weights, extended, pool)
    for index in range(3):
        forward.project_layer(index)
        tally.add_layer(
            forward.queries_at(index, positions), forward.buffers.keys()[:, :NUM_TOKENS]
        )
        forward.finish_layer(index)
    backend = CpuBackend(weights, num_threads=2)
    result = backend.score(
        ScoreInput(ids, lookahead_tokens=3),
        stop=threading.Event(),
        progress=lambda done, total: None,
    )
    backend.close()
    np.testing.assert_allclose(result.scores, tally.scores(), rtol=1e-3)
    np.testing.assert_allclose(result.panel, tally.panel(), atol=1e-4)
