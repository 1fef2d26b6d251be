"""modelfile.hparams: the shape is what was written, and what we cannot compute is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from modelfile.gguf_file import GgufFile
from modelfile.hparams import ModelShape, expected_tensors
from skim.errors import ModelFileError
from tests.fixtures.llama_logits import llama_logits
from tests.fixtures.tiny_gguf import write_tiny_gguf


def _shape(path: Path, **options: bool) -> ModelShape:
    with GgufFile.open(path) as gguf:
        return ModelShape.from_gguf(gguf, **options)


def test_sizes_are_those_written(tmp_path: Path) -> None:
    path = write_tiny_gguf(
        tmp_path / "t.gguf", layers=3, embed=96, heads=6, kv_heads=2, head_dim=32, ffn=160,
        context_length=2048, rope_freq_base=5e5, tie_embeddings=False,
    )  # fmt: skip
    shape = _shape(path)
    assert (shape.arch, shape.layers, shape.embed, shape.ffn) == ("qwen3", 3, 96, 160)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim) == (6, 2, 32, 32)
    assert (shape.vocab_size, shape.context_length) == (645, 2048)
    assert shape.rms_eps == pytest.approx(1e-6)
    assert not shape.tied_embeddings
    assert (shape.rope.kind, shape.rope.freq_base, shape.rope.dimension_count) == ("none", 5e5, 32)
    assert shape.rope.original_context == 2048


@pytest.mark.parametrize(
    ("arch", "qk_norm", "qkv_bias", "pairing"),
    [
        ("qwen3", True, False, "halves"),
        ("qwen2", False, True, "halves"),
        ("llama", False, False, "interleaved"),
    ],
)
def test_architectures_differ_where_they_do(
    tmp_path: Path, arch: str, qk_norm: bool, qkv_bias: bool, pairing: str
) -> None:
    shape = _shape(write_tiny_gguf(tmp_path / "t.gguf", arch=arch))
    assert (shape.qk_norm, shape.qkv_bias, shape.rope.pairing) == (qk_norm, qkv_bias, pairing)
    with GgufFile.open(tmp_path / "t.gguf") as gguf:
        assert expected_tensors(shape).keys() == gguf.tensors.keys()


def test_rope_scaling_is_read_in_each_of_its_forms(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_context": 1024}
    rope = _shape(write_tiny_gguf(tmp_path / "y.gguf", rope_scaling=yarn)).rope
    assert (rope.kind, rope.factor, rope.original_context) == ("yarn", 4.0, 1024)
    assert (rope.beta_fast, rope.beta_slow, rope.attention_factor) == (32.0, 1.0, 1.0)

    linear = {"type": "linear", "factor": 2.0}
    rope = _shape(write_tiny_gguf(tmp_path / "l.gguf", rope_scaling=linear)).rope
    assert (rope.kind, rope.factor) == ("linear", 2.0)

    factors = np.linspace(1, 8, 16, dtype=np.float32)
    rope = _shape(write_tiny_gguf(tmp_path / "3.gguf", arch="llama", rope_freqs=factors)).rope
    assert rope.kind == "llama3"
    assert rope.freq_factors == tuple(float(factor) for factor in factors)


def test_shape_is_a_value(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf")
    assert _shape(path) == _shape(path)
    assert len({_shape(path), _shape(path)}) == 1


def test_other_architectures_are_refused_unless_only_llama_cpp_runs_them(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "vl.gguf", arch="qwen3vl", head_dim=64)
    with pytest.raises(ModelFileError) as refused:
        _shape(path)
    assert refused.value.reason == "ARCHITECTURE_UNSUPPORTED"
    assert refused.value.metadata == {"got": "qwen3vl", "allowed": "qwen3, qwen2, llama"}
    shape = _shape(path, any_architecture=True)
    assert shape.rope.sections == (11, 11, 10, 0)
    assert shape.head_dim == 64


def test_per_layer_values_give_their_maximum_in_the_permissive_form(tmp_path: Path) -> None:
    path = tmp_path / "hybrid.gguf"
    writer = GGUFWriter(path, "qwen35")
    writer.add_context_length(262144)
    writer.add_embedding_length(256)
    writer.add_block_count(4)
    writer.add_head_count(8)
    writer.add_array("qwen35.attention.head_count_kv", [0, 0, 0, 2])
    writer.add_key_length(64)
    writer.add_rope_dimension_count(16)
    writer.add_rope_dimension_sections([3, 3, 2, 0])
    writer.add_vocab_size(100)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    shape = _shape(path, any_architecture=True)
    assert (shape.layers, shape.kv_heads, shape.vocab_size) == (4, 2, 100)
    assert shape.rope.dimension_count == 16


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight", "blk.1.ffn_up.weight"),
        (b"blk.1.attn_norm", b"blk.9.attn_norm", "2 layers"),
        (b"blk.0.attn_q_norm", b"blk.0.attn_z_norm", "attn_q_norm"),
        (b"qwen3.block_count", b"qwen3.block_kount", "block_count"),
        (b"qwen3.context_length", b"qwen3.kontext_length", "context_length"),
    ],
)
def test_missing_key_or_tensor_is_named(
    tmp_path: Path, before: bytes, after: bytes, problem: str
) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf")
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after))
    with pytest.raises(ModelFileError, match=problem):
        _shape(path)


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        (b"qwen3.block_count", 2, 0),
        (b"qwen3.block_count", 2, 2**32 - 1),
        (b"qwen3.embedding_length", 64, 65),
        (b"qwen3.attention.head_count", 4, 0),
        (b"qwen3.attention.head_count_kv", 2, 3),
        (b"qwen3.attention.key_length", 32, 31),
        (b"qwen3.attention.value_length", 32, 16),
        (b"qwen3.feed_forward_length", 128, 127),
    ],
)
def test_impossible_size_is_refused(tmp_path: Path, key: bytes, old: int, new: int) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf")
    content = path.read_bytes()
    field = key + (4).to_bytes(4, "little")
    assert content.count(field + old.to_bytes(4, "little")) == 1
    path.write_bytes(
        content.replace(field + old.to_bytes(4, "little"), field + new.to_bytes(4, "little"))
    )
    with pytest.raises(ModelFileError):
        _shape(path)


def test_query_heads_that_kv_heads_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf", heads=4, kv_heads=3)
    with pytest.raises(ModelFileError, match="multiple of KV heads"):
        _shape(path)


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama", "qwen3vl"])
def test_tiny_models_run_in_llama_cpp_with_unit_scale_logits(tmp_path: Path, arch: str) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf", arch=arch, embed=128, heads=2, head_dim=64)
    logits = llama_logits(path, np.arange(40, 60, dtype=np.int32))
    assert np.isfinite(logits).all()
    assert 0.7 < logits.std() < 1.4
    # Not one token over and over: comparisons of greedy answers mean something.
    assert len(set(logits.argmax(axis=1).tolist())) > 10


def test_qwen3vl_relabel_gives_the_very_logits_of_qwen3(tmp_path: Path) -> None:
    ids = np.arange(40, 60, dtype=np.int32)
    rows = [
        llama_logits(write_tiny_gguf(tmp_path / arch, arch=arch, head_dim=64), ids)
        for arch in ("qwen3", "qwen3vl")
    ]
    np.testing.assert_array_equal(*rows)
