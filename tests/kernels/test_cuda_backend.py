"""The whole CUDA backend gives the CPU backend's scores, selection, panel and densities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from drafter_svc.backend import AttentionConfig
from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer
from skim.demo_document import build_demo
from tests.fixtures.cuda_backend import (
    EVERYTHING,
    SPARSE,
    Machine,
    assert_same,
    assert_same_order,
    emulated,
    machine,
    model,
    prompt,
)

__all__ = ["machine"]

MODELS = Path(__file__).resolve().parents[2] / "models"


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
def test_sparse_pass_equals_the_cpu_backends(machine: Machine, tmp_path: Path, arch: str) -> None:
    pair, ids = machine.pair(model(tmp_path, arch)), prompt(1100, seed=0)
    cuda, cpu = pair.score(ids, attention=SPARSE)
    assert_same_order(cuda, cpu, ids.size)
    assert min(cpu.density) < 0.9  # guards the test: blocks are pruned
    # A block whose mass lies on the threshold may fall to either side: one or two pairs of 180.
    np.testing.assert_allclose(cuda.density, cpu.density, atol=2.1 / 180)


@pytest.mark.parametrize("num_tokens", [1, 9, 127, 128, 129, 300])
def test_dense_pass_of_any_length_equals_the_cpu_backends(
    machine: Machine, tmp_path: Path, num_tokens: int
) -> None:
    cuda, cpu = machine.pair(model(tmp_path)).score(prompt(num_tokens, seed=1))
    assert_same(cuda, cpu)
    assert cuda.density == (1.0, 1.0)


def test_hopper_path_equals_the_cpu_backend(tmp_path: Path) -> None:
    path = model(tmp_path, layers=2)
    hopper = Machine(lambda: emulated(arch="sm_90a"))
    assert_same(*hopper.pair(path).score(prompt(280, seed=8), attention=EVERYTHING))
    hopper.close()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 1, 128), (3, 1, 64), (2, 2, 256)])
def test_other_heads_equal_the_cpu_backends(
    machine: Machine, tmp_path: Path, heads: int, kv_heads: int, head_dim: int
) -> None:
    path = model(tmp_path, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=2)
    assert_same(*machine.pair(path).score(prompt(280, seed=2), attention=EVERYTHING))


def test_rows_in_several_chunks_equal_the_cpu_backends(machine: Machine, tmp_path: Path) -> None:
    pair = machine.pair(model(tmp_path, "qwen2"), chunk_rows=128)
    assert_same(*pair.score(prompt(300, seed=3), attention=EVERYTHING))


@pytest.mark.parametrize("dtype", ["F32", "Q8_0", "Q4_0"])
def test_weights_of_other_types_equal_the_cpu_backends(
    machine: Machine, tmp_path: Path, dtype: str
) -> None:
    """Q4_0 is not dequantised by a kernel; it goes up as float32."""
    pair = machine.pair(model(tmp_path, "llama", dtype=dtype))
    assert_same(*pair.score(prompt(150, seed=4)))


def test_long_context_scaling_equals_the_cpu_backends(machine: Machine, tmp_path: Path) -> None:
    cuda, cpu = machine.pair(model(tmp_path, context_length=128)).score(prompt(300, seed=5))
    assert cuda.yarn_factor == pytest.approx(300 / 128)
    assert_same(cuda, cpu)


def test_mid_layer_stops_early_with_the_cpu_backends_scores(
    machine: Machine, tmp_path: Path
) -> None:
    pair = machine.pair(model(tmp_path))
    cuda, cpu = pair.score(prompt(300, seed=6), scorer="mid_layer", attention=EVERYTHING)
    assert_same(cuda, cpu)
    assert cuda.layers_run == 2 and len(cuda.density) == 1


def test_copied_query_equals_the_cpu_backends(machine: Machine, tmp_path: Path) -> None:
    pair = machine.pair(model(tmp_path, layers=2))
    cuda, cpu = pair.score(prompt(1100, seed=7), query_tokens=(20, 60))
    assert cuda.query_copied
    assert_same(cuda, cpu)


@pytest.mark.parametrize("scorer", ["lexical", "ends", "random"])
def test_scorers_without_a_model_give_the_same_scores(
    machine: Machine, tmp_path: Path, scorer: str
) -> None:
    cuda, cpu = machine.pair(model(tmp_path, layers=1)).score(prompt(500, seed=8), scorer=scorer)
    np.testing.assert_array_equal(cuda.scores, cpu.scores)
    assert cuda.panel is None


@pytest.mark.parametrize("file", ["skim-drafter.gguf", "skim-drafter-cross.gguf"])
def test_bundled_drafters_equal_the_cpu_backends(machine: Machine, file: str) -> None:
    pair, ids = machine.pair(MODELS / file), prose(MODELS / file, 1100)
    cuda, cpu = pair.score(ids, attention=AttentionConfig(dense_below_tokens=0))
    assert_same_order(cuda, cpu, ids.size)
    np.testing.assert_allclose(cuda.density, cpu.density, atol=0.03)


def prose(path: Path, num_tokens: int) -> NDArray[np.int32]:
    """A document with a question at its end, in a bundled drafter's tokens."""
    with GgufFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    count = lambda text: tokenizer.encode(text.encode()).ids.size  # noqa: E731
    document = build_demo(num_tokens, count, seed=3)
    return tokenizer.encode(f"{document.text}\n\n{document.question}".encode()).ids
