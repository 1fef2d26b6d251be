"""The drafter's weights and what differs between qwen3, llama and qwen2, as one description.

All three are the same decoder: RMSNorm, grouped-query attention with rotary positions, SwiGLU. They
differ in a norm over each query and key head (qwen3), biases on the projections (qwen2), and the
pairing and scaling of the rotary positions (llama). So a layer is one record in which the parts a
model lacks are None, and `layer_math` has no branch per architecture. Refuses what `ModelShape`
refuses: other architectures, missing or misshapen tensors (ModelFileError).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from drafter_svc.backend import DrafterModel
from kernels.reference import RopeScaling
from modelfile.gguf_file import GgufFile
from modelfile.hparams import ModelShape

Matrix: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class LayerWeights:
    """One layer in float32; matrices are [outputs, inputs].

    `qkv` stacks the query, key and value projections of all heads in this order, `gate_up` the two
    halves of the feed-forward's input. `head_norm` [num_heads + num_kv_heads, head_dim] holds the
    norm of each query and key head; it and `qkv_bias` are None where the architecture has none.
    """

    attention_norm: Matrix
    qkv: Matrix
    qkv_bias: Matrix | None
    head_norm: Matrix | None
    attention_output: Matrix
    mlp_norm: Matrix
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class DrafterWeights:
    """A whole drafter on the host.

    `output` is the vocabulary's matrix, the embedding itself where the two are tied. `end_id` ends
    a generation; None where the file names none.
    """

    shape: ModelShape
    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    output_norm: Matrix
    output: Matrix
    frequency_divisors: NDArray[np.float32] | None = None
    end_id: int | None = None

    def describe(self) -> DrafterModel:
        """Summarise for `GetDrafter`."""
        tensors = [self.embedding, self.output_norm]
        if self.output is not self.embedding:
            tensors.append(self.output)
        for layer in self.layers:
            tensors += [part for part in vars(layer).values() if part is not None]
        shape = self.shape
        return DrafterModel(
            architecture=shape.arch,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            hidden_size=shape.embed,
            vocab_size=shape.vocab_size,
            trained_context_tokens=shape.context_length,
            num_parameters=sum(tensor.size for tensor in tensors),
            weight_bytes=sum(tensor.nbytes for tensor in tensors),
        )


def load_weights(file: GgufFile) -> DrafterWeights:
    """Read and dequantise every tensor of a supported model.

    Raises:
        ModelFileError: see `ModelShape.from_gguf`.
    """
    shape = ModelShape.from_gguf(file)
    embedding = _read(file, "token_embd.weight")
    factors = shape.rope.freq_factors
    end_id = file.metadata.get("tokenizer.ggml.eos_token_id")
    return DrafterWeights(
        shape=shape,
        embedding=embedding,
        layers=tuple(_load_layer(file, shape, layer) for layer in range(shape.layers)),
        output_norm=_read(file, "output_norm.weight"),
        output=embedding if shape.tied_embeddings else _read(file, "output.weight"),
        frequency_divisors=None if factors is None else np.asarray(factors, dtype=np.float32),
        end_id=end_id if isinstance(end_id, int) else None,
    )


def _read(file: GgufFile, name: str) -> Matrix:
    """Read a tensor into memory of our own: a mapped one would change, or fault, with the file."""
    tensor = file.tensor(name)
    return tensor if tensor.flags.writeable else tensor.copy()


def _load_layer(file: GgufFile, shape: ModelShape, layer: int) -> LayerWeights:
    def tensor(part: str) -> Matrix:
        return _read(file, f"blk.{layer}.{part}")

    def rotated(part: str, heads: int) -> Matrix:
        """A query or key tensor with its heads in the half-split order that `apply_rope` takes."""
        return halves(tensor(part), heads) if shape.rope.pairing == "interleaved" else tensor(part)

    bias = head_norm = None
    if shape.qkv_bias:
        bias = np.concatenate(
            [
                rotated("attn_q.bias", shape.heads),
                rotated("attn_k.bias", shape.kv_heads),
                tensor("attn_v.bias"),
            ]
        )
    if shape.qk_norm:
        head_norm = np.concatenate(
            [
                np.tile(rotated("attn_q_norm.weight", 1), (shape.heads, 1)),
                np.tile(rotated("attn_k_norm.weight", 1), (shape.kv_heads, 1)),
            ]
        )
    return LayerWeights(
        attention_norm=tensor("attn_norm.weight"),
        qkv=np.concatenate(
            [
                rotated("attn_q.weight", shape.heads),
                rotated("attn_k.weight", shape.kv_heads),
                tensor("attn_v.weight"),
            ]
        ),
        qkv_bias=bias,
        head_norm=head_norm,
        attention_output=tensor("attn_output.weight"),
        mlp_norm=tensor("ffn_norm.weight"),
        gate_up=np.concatenate([tensor("ffn_gate.weight"), tensor("ffn_up.weight")]),
        down=tensor("ffn_down.weight"),
    )


def halves(rows: Matrix, heads: int) -> Matrix:
    """Reorder each head's rows from pairs (2i, 2i + 1) to pairs (i, i + head_dim / 2).

    Queries and keys meet only each other, so an order common to both leaves attention as it was.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(rows.shape)


def scaling_for(shape: ModelShape, num_tokens: int) -> RopeScaling:
    """Choose the rotary scaling of a run: the file's, or YaRN just wide enough for its length.

    Past the context that the file allows, angles the model never saw make attention noise: YaRN is
    switched on (or the file's own factor raised) so that the run ends where the context did.
    """
    rope = shape.rope
    stretch = max(1.0, num_tokens / shape.context_length)
    if rope.kind == "yarn":
        room = rope.factor * rope.original_context
        return RopeScaling(
            kind="yarn",
            factor=rope.factor * max(1.0, num_tokens / max(room, shape.context_length)),
            original_context=rope.original_context,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            attention_factor=rope.attention_factor,
        )
    if rope.kind == "linear":
        return RopeScaling(kind="linear", factor=rope.factor * stretch)
    if stretch > 1.0:
        return RopeScaling(kind="yarn", factor=stretch, original_context=shape.context_length)
    return RopeScaling()
