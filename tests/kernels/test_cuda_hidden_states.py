"""The residual stream of the CUDA forward pass, layer by layer, and at a real model's size.

Tolerance: the root mean square of the error over that of the residual. A layer rounds its inputs
and outputs to bf16 (2^-9 = 0.002 each), and errors of one layer are inputs of the next: 0.011 after
three layers of the tiny models (whose embeddings are small beside what the layers add), 0.006 after
seven of Qwen3-0.6B's shape. A wrong rope, norm, bias or head map gives above 0.1.
"""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.random_model import SHAPES, write_random_gguf
from drafter_svc.architecture import load_weights, scaling_for
from drafter_svc.backend import AttentionConfig, ScoreInput
from drafter_svc.cpu_forward import CpuForward
from drafter_svc.cpu_pool import WorkPool
from drafter_svc.cuda_attention import CudaAttention
from drafter_svc.cuda_backend import CudaBackend
from drafter_svc.cuda_forward import CudaForward
from drafter_svc.cuda_lists import PassLists, rule_of
from drafter_svc.cuda_marks import StageMarks
from drafter_svc.cuda_workspace import plan_pass
from modelfile.gguf_file import GgufFile
from tests.fixtures.cuda_backend import (
    Machine,
    Pair,
    assert_same_order,
    kept,
    machine,
    model,
    prompt,
    spearman,
)

__all__ = ["machine"]

DENSE = AttentionConfig(dense_below_tokens=1 << 30)
TINY_LIMIT, LIMIT = 1.5e-2, 1e-2


def on_cuda(backend: CudaBackend, ids: NDArray[np.int32]) -> list[NDArray[np.float32]]:
    """float32 [num_tokens, embed] after every layer but the last, which no pass finishes."""
    request, device, weights = ScoreInput(ids, attention=DENSE), backend.device, backend.weights
    _, size = backend.plan(request)
    backend.workspace.prepare(plan_pass(weights.shape, size))
    scaling = scaling_for(weights.shape, ids.size)
    lists = PassLists(
        device, backend.workspace, size, weights.shape.heads, rule_of(DENSE), backend.planted
    )
    attention = CudaAttention(device, weights.shape, backend.workspace, size, DENSE, lists)
    marks = StageMarks(device)
    forward = CudaForward(device, weights, backend.workspace, size, scaling, marks)
    forward.embed(ids)
    states = []
    for index in range(size.num_attending):
        forward.project(index)
        forward.finish(index, attention)
        states.append(np.empty((ids.size, weights.shape.embed), dtype=np.float32))
        device.download(backend.workspace.at("x"), states[-1])
    return states


def on_cpu(path: Path, ids: NDArray[np.int32], layers: int) -> list[NDArray[np.float32]]:
    with GgufFile.open(path) as file:
        weights = load_weights(file)
    pool = WorkPool(1)
    scaling = scaling_for(weights.shape, ids.size)
    forward = CpuForward(weights, ids, scaling, DENSE, pool, threading.Event())
    states = []
    for index in range(layers):
        forward.project_layer(index)
        forward.finish_layer(index)
        states.append(forward.x.copy())
    pool.close()
    return states


def error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    difference = ours.astype(np.float64) - theirs
    return float(np.sqrt((difference**2).mean() / (theirs.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
def test_residual_after_every_layer_equals_the_cpu_backends(
    machine: Machine, tmp_path: Path, arch: str
) -> None:
    path, ids = model(tmp_path, arch, layers=4, qk_gain=2.0), prompt(200, seed=30)
    cuda = on_cuda(machine.cuda(path), ids)
    errors = [error(a, b) for a, b in zip(cuda, on_cpu(path, ids, 3), strict=True)]
    assert max(errors) < TINY_LIMIT, errors


@pytest.fixture(scope="module")
def real_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-0.6B's shape with random weights."""
    path = tmp_path_factory.mktemp("shape") / "qwen3.gguf"
    return write_random_gguf(path, SHAPES["qwen3-0.6b"])


@pytest.mark.gpu
def test_real_shape_equals_transformers(real_shape: Path) -> None:
    """Against float32 on the same GPU: what bf16 costs is then ours alone."""
    torch: Any = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers: Any = pytest.importorskip("transformers", reason="needs torch and transformers")
    backend = CudaBackend.open(real_shape)
    ids = np.random.default_rng(31).integers(0, 150_000, 4097).astype(np.int32)
    ours = on_cuda(backend, ids)
    backend.close()
    theirs = their_states(torch, transformers, real_shape, ids)
    errors = [error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) < LIMIT, errors


def their_states(
    torch: Any, transformers: Any, path: Path, ids: NDArray[np.int32]
) -> list[NDArray[np.float32]]:
    names = importlib.import_module("tests.unit.test_drafter_forward_transformers")
    state = {}
    with GgufFile.open(path) as file:
        for name in file.tensors:
            stem, kind = name.rsplit(".", 1)
            if stem.startswith("blk."):
                _, layer, part = stem.split(".")
                renamed = f"layers.{layer}.{names.LAYER_NAMES[part]}.{kind}"
            else:
                renamed = {"token_embd": "embed_tokens", "output_norm": "norm"}[stem] + f".{kind}"
            state[renamed] = torch.from_numpy(file.tensor(name).copy())
    shape = SHAPES["qwen3-0.6b"]
    config = transformers.Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.embed,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.rms_eps,
        max_position_embeddings=shape.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": shape.freq_base},
        use_cache=False,
    )
    theirs = transformers.Qwen3Model(config).to(torch.float32).eval()
    theirs.load_state_dict(state)
    theirs = theirs.to("cuda")
    with torch.no_grad():
        tokens = torch.from_numpy(ids.astype(np.int64))[None].to("cuda")
        output = theirs(input_ids=tokens, output_hidden_states=True)
    return [layer[0].float().cpu().numpy() for layer in output.hidden_states[1:-1]]


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_real_shape_scores_as_the_cpu_backend_does(machine: Machine, real_shape: Path) -> None:
    pair: Pair = machine.pair(real_shape, cpu_threads=None)
    ids = prompt(4097, seed=32)
    cuda, cpu = pair.score(ids, attention=AttentionConfig(dense_below_tokens=0, alpha=0.5))
    assert spearman(cuda.scores, cpu.scores) >= 0.999
    differing = len(kept(cuda, ids.size) ^ kept(cpu, ids.size))
    assert differing <= 0.005 * cpu.scores.size
    np.testing.assert_allclose(cuda.density, cpu.density, atol=0.01)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_tokens", [8193, 32_768])
def test_bundled_drafter_scores_a_long_prompt_as_the_cpu_backend_does(
    machine: Machine, num_tokens: int
) -> None:
    path = Path(__file__).resolve().parents[2] / "models/skim-drafter.gguf"
    ids = np.resize(prompt(num_tokens, seed=33), num_tokens)
    cuda, cpu = machine.pair(path, cpu_threads=None).score(ids)
    assert_same_order(cuda, cpu, num_tokens)
