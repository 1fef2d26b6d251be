"""The CPU drafter's forward pass against `transformers` on the same random float32 weights.

A second independent truth beside llama.cpp (`test_drafter_forward`), over thousands of positions
and after every layer. torch and transformers are no dependencies of Skim: where they are missing
this is skipped. `pytest -rP` shows the errors.

Tolerance: 1e-3 of the largest value. transformers takes its angles in float32, where a position of
3,000 radians is known to 1.2e-4; a wrong rope, norm, mask or head map gives above 0.1.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from drafter_svc.architecture import load_weights, scaling_for
from drafter_svc.backend import AttentionConfig
from drafter_svc.cpu_forward import CpuForward
from drafter_svc.cpu_pool import WorkPool
from drafter_svc.layer_math import logits
from modelfile.gguf_file import GgufFile
from tests.fixtures.tiny_gguf import write_tiny_gguf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to fail on

NUM_TOKENS = 3_000
TOLERANCE = 1e-3
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 32
BASE = 1e4
CLASSES = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
}
# GGUF's name of a layer's tensor, and that of transformers.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def llama_3_divisors(
    factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> NDArray[np.float32]:
    """The table that a converter writes into `rope_freqs.weight`: by wavelength, kept below
    original_context / high_freq_factor, divided above original_context / low_freq_factor."""
    wavelengths = 2 * np.pi * BASE ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    turns = original_context / wavelengths
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def their_model(path: Path, arch: str, rope: dict[str, Any]) -> Any:
    """Build the model of transformers from the file's tensors, read by the gguf package."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    state = {}
    for name, data in tensors.items():
        stem, kind = name.rsplit(".", 1)
        if name == "rope_freqs.weight":
            continue
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            if arch == "llama" and part in ("attn_q", "attn_k"):
                data = from_pairs(data)
            renamed = f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
        else:
            renamed = f"{NAMES[stem]}.{kind}"
        state[renamed] = torch.from_numpy(np.array(data))
    vocab_size, hidden_size = tensors["token_embd.weight"].shape
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[arch])
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=tensors["blk.0.ffn_gate.weight"].shape[0],
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-6,
        max_position_embeddings=int(
            rope.get("factor", 1) * rope.get("original_max_position_embeddings", NUM_TOKENS)
        ),
        tie_word_embeddings="output.weight" not in tensors,
        rope_parameters={"rope_type": "default", "rope_theta": BASE, **rope},
    )
    model = model_class(config).to(torch.float32).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"} and (config.tie_word_embeddings or not missing)
    model.tie_weights()
    return model


def from_pairs(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Undo the order of rows in llama's GGUF: a head's i and i + head_dim / 2 stand together."""
    heads = rows.reshape(-1, HEAD_DIM // 2, 2, rows.shape[-1])
    return heads.transpose(0, 2, 1, 3).reshape(rows.shape)


def ours(path: Path, ids: NDArray[np.int32], pool: WorkPool) -> list[NDArray[np.float32]]:
    """The residual stream after every layer, and the logits."""
    with GgufFile.open(path) as file:
        weights = load_weights(file)
    scaling = scaling_for(weights.shape, ids.size)
    attention = AttentionConfig(dense_below_tokens=ids.size + 1)
    forward = CpuForward(weights, ids, scaling, attention, pool, threading.Event())
    states = []
    for index in range(weights.shape.layers):
        forward.project_layer(index)
        forward.finish_layer(index)
        states.append(forward.x.copy())
    return [*states, logits(forward.x, weights)]


def theirs(model: Any, ids: NDArray[np.int32]) -> list[NDArray[np.float32]]:
    """The same of transformers, whose last hidden state has the final norm already: left out."""
    with torch.no_grad():
        output = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
    states = [state[0].numpy() for state in output.hidden_states[1:-1]]
    return [*states, output.logits[0].numpy()]


@pytest.fixture
def pool() -> Iterator[WorkPool]:
    opened = WorkPool(2)
    yield opened
    opened.close()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1_024}
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FILE_YARN = {"type": "yarn", "factor": 4.0, "original_context": 1_024}


@pytest.mark.parametrize(
    ("arch", "in_file", "rope"),
    [
        pytest.param("qwen3", {}, {}, id="qwen3"),
        pytest.param("qwen2", {}, {}, id="qwen2"),
        pytest.param("llama", {"tie_embeddings": False}, {}, id="llama"),
        pytest.param("qwen3", {"rope_scaling": FILE_YARN}, YARN, id="qwen3-yarn"),
        pytest.param("qwen2", {"rope_scaling": FILE_YARN}, YARN, id="qwen2-yarn"),
        pytest.param("llama", {"rope_scaling": FILE_YARN}, YARN, id="llama-yarn"),
        pytest.param(
            "qwen3",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0},
            id="qwen3-linear",
        ),
        pytest.param(
            "llama",
            {"rope_freqs": llama_3_divisors(**LLAMA_3, original_context=1_024)},
            {"rope_type": "llama3", **LLAMA_3, "original_max_position_embeddings": 1_024},
            id="llama-3-scaling",
        ),
        pytest.param(
            "qwen3",
            {"context_length": 1_200},  # past it the drafter switches YaRN on by itself
            {**YARN, "factor": NUM_TOKENS / 1_200, "original_max_position_embeddings": 1_200},
            id="qwen3-past-its-context",
        ),
    ],
)
def test_every_layer_and_the_logits_equal_those_of_transformers(
    pool: WorkPool, tmp_path: Path, arch: str, in_file: dict[str, Any], rope: dict[str, Any]
) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        arch=arch,
        layers=LAYERS,
        embed=HEADS * HEAD_DIM,
        heads=HEADS,
        kv_heads=KV_HEADS,
        seed=21,
        qk_gain=2.0,
        rope_freq_base=BASE,
        **in_file,
    )
    ids = np.random.default_rng(22).integers(0, 640, NUM_TOKENS).astype(np.int32)
    expected, got = theirs(their_model(path, arch, rope), ids), ours(path, ids, pool)
    del got[LAYERS - 1]  # without the final norm
    errors = [
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, expected, strict=True)
    ]
    print(f"largest relative error by layer, then of the logits: {errors}")
    assert max(errors) <= TOLERANCE
