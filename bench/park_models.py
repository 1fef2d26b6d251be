"""Drafters of real shapes by size, for benchmarks that need their layout and no file."""

from __future__ import annotations

from bench.random_model import SHAPES, RandomShape
from modelfile.hparams import ModelShape
from modelfile.rope_shape import RopeShape

# Region bytes: 0.3, 1.2, 3.4 and 8.0 GB.
MODELS: dict[str, RandomShape] = {
    "small-drafter": RandomShape(
        "qwen3", 8, 1024, 16, 8, 128, 3072, 32_768, 1e-6, 1e6, context_length=40_960
    ),
    "qwen3-0.6b": SHAPES["qwen3-0.6b"],
    "qwen3-1.7b": SHAPES["qwen3-1.7b"],
    "qwen3-4b": RandomShape(
        "qwen3", 36, 2560, 32, 8, 128, 9728, 151_936, 1e-6, 1e6, context_length=40_960
    ),
    # For a run without a GPU.
    "tiny": RandomShape("qwen3", 4, 128, 2, 1, 64, 256, 4_096, 1e-6, 1e6, context_length=40_960),
}


def shape_of(name: str) -> ModelShape:
    """The shape of a model of `MODELS`, as its file would state it."""
    shape = MODELS[name]
    return ModelShape(
        arch=shape.arch,
        layers=shape.layers,
        embed=shape.embed,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.head_dim,
        ffn=shape.ffn,
        vocab_size=shape.vocab_size,
        rms_eps=shape.rms_eps,
        context_length=shape.context_length,
        tied_embeddings=True,
        qk_norm=True,
        qkv_bias=False,
        rope=RopeShape(
            freq_base=shape.freq_base,
            dimension_count=shape.head_dim,
            pairing="halves",
            kind="none",
            factor=1.0,
            original_context=shape.context_length,
            attention_factor=1.0,
            beta_fast=32.0,
            beta_slow=1.0,
            freq_factors=None,
            sections=None,
        ),
    )
