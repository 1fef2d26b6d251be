"""What a model's metadata says about its shape: `ModelShape`, one value object for all who need it.

Read from a `GgufFile` by the drafter (which builds its forward pass on it and takes the three
architectures of `FORWARD_ARCHITECTURES` only) and by the target (which leaves the forward pass to
llama.cpp and takes any: `any_architecture=True`). Defaults for missing keys are llama.cpp's.
Refuses (ModelFileError) unsupported architectures, impossible sizes, missing or misshapen tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelfile.gguf_file import GgufFile
from modelfile.header import StringArray
from modelfile.rope_shape import RopeShape, read_rope
from skim.errors import ModelFileError

# Architectures whose forward pass the drafter computes itself.
FORWARD_ARCHITECTURES = ("qwen3", "qwen2", "llama")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer. Lengths are in tokens, widths in components.

    `head_dim` is the width of one query or key head, `value_dim` of one value head;
    `context_length` is what the file says the model can take (YaRN of the file included).
    """

    arch: str
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    ffn: int
    vocab_size: int
    rms_eps: float
    context_length: int
    tied_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    rope: RopeShape

    @classmethod
    def from_gguf(cls, gguf: GgufFile, *, any_architecture: bool = False) -> ModelShape:
        """Read the shape from a file's metadata.

        Args:
            any_architecture: accept architectures that only llama.cpp can run; per-layer values
                then give their maximum, and no tensor is checked.
        Raises:
            ModelFileError: architecture not supported, a key missing or impossible, or (unless
                `any_architecture`) a tensor missing or of the wrong shape.
        """
        arch = gguf.text("general.architecture")
        if not any_architecture:
            _check_supported(gguf, arch)
        key = f"{arch}."
        embed = gguf.size(key + "embedding_length")
        heads = gguf.size(key + "attention.head_count")
        default_head = embed // heads
        head_dim = gguf.size(key + "attention.key_length", default_head)
        kv_heads = gguf.size(key + "attention.head_count_kv", heads)
        if not any_architecture and (heads % kv_heads or head_dim % 2):
            raise ModelFileError(
                f"{gguf.path}: query heads must be a multiple of KV heads, and a head even",
                got=f"{heads} heads, {kv_heads} KV heads, head of {head_dim}",
                allowed="heads % kv_heads == 0, head % 2 == 0",
            )
        shape = cls(
            arch=arch,
            layers=gguf.size(key + "block_count"),
            embed=embed,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=gguf.size(key + "attention.value_length", default_head),
            ffn=gguf.size(key + "feed_forward_length", 1 if any_architecture else None),
            vocab_size=_vocab_size(gguf, arch),
            rms_eps=gguf.number(
                key + "attention.layer_norm_rms_epsilon", 1e-5 if any_architecture else None
            ),
            context_length=gguf.size(key + "context_length"),
            tied_embeddings="output.weight" not in gguf.tensors,
            qk_norm="blk.0.attn_q_norm.weight" in gguf.tensors,
            qkv_bias="blk.0.attn_q.bias" in gguf.tensors,
            rope=read_rope(gguf, arch, head_dim),
        )
        if not any_architecture:
            check_tensors(gguf, shape)
        return shape


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """List the tensors that a forward architecture needs, with their NumPy shapes."""
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (shape.vocab_size, shape.embed),
        "output_norm.weight": (shape.embed,),
    }
    if not shape.tied_embeddings:
        tensors["output.weight"] = (shape.vocab_size, shape.embed)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        tensors[block + "attn_norm.weight"] = (shape.embed,)
        tensors[block + "attn_q.weight"] = (q_width, shape.embed)
        tensors[block + "attn_k.weight"] = (kv_width, shape.embed)
        tensors[block + "attn_v.weight"] = (kv_width, shape.embed)
        tensors[block + "attn_output.weight"] = (shape.embed, q_width)
        if shape.qk_norm:
            tensors[block + "attn_q_norm.weight"] = (shape.head_dim,)
            tensors[block + "attn_k_norm.weight"] = (shape.head_dim,)
        if shape.qkv_bias:
            tensors[block + "attn_q.bias"] = (q_width,)
            tensors[block + "attn_k.bias"] = (kv_width,)
            tensors[block + "attn_v.bias"] = (kv_width,)
        tensors[block + "ffn_norm.weight"] = (shape.embed,)
        tensors[block + "ffn_gate.weight"] = (shape.ffn, shape.embed)
        tensors[block + "ffn_up.weight"] = (shape.ffn, shape.embed)
        tensors[block + "ffn_down.weight"] = (shape.embed, shape.ffn)
    return tensors


def check_tensors(gguf: GgufFile, shape: ModelShape) -> None:
    """Refuse a file whose tensors are not those that its shape asks for (ModelFileError)."""
    problem = None
    if shape.arch == "qwen3" and not shape.qk_norm:
        problem = "qwen3 without blk.0.attn_q_norm.weight"
    elif shape.arch == "qwen2" and not shape.qkv_bias:
        problem = "qwen2 without blk.0.attn_q.bias"
    elif shape.value_dim != shape.head_dim:
        problem = f"value heads of {shape.value_dim} beside key heads of {shape.head_dim}"
    elif shape.rope.dimension_count != shape.head_dim:
        problem = f"partial rope: {shape.rope.dimension_count} of {shape.head_dim} components"
    elif shape.rope.kind == "longrope":
        problem = "rope scaling longrope"
    if problem:
        raise ModelFileError(f"{gguf.path}: unsupported: {problem}", got=problem)
    if f"blk.{shape.layers - 1}.attn_norm.weight" not in gguf.tensors:
        raise ModelFileError(  # before listing the tensors of a corrupt, huge number of layers
            f"{gguf.path}: the metadata says {shape.layers} layers, the last one's are missing",
            got=f"{len(gguf.tensors)} tensors",
            allowed=f"blk.{shape.layers - 1}.attn_norm.weight and the rest",
        )
    for name, expected in expected_tensors(shape).items():
        if gguf.info(name).shape != expected:
            raise ModelFileError(
                f"{gguf.path}: tensor {name!r} has shape {gguf.info(name).shape}, not {expected}",
                got=gguf.info(name).shape,
                allowed=expected,
            )


def _check_supported(gguf: GgufFile, arch: str) -> None:
    if arch not in FORWARD_ARCHITECTURES:
        raise ModelFileError(
            f"{gguf.path}: architecture {arch!r} is not supported as a drafter; "
            f"supported: {', '.join(FORWARD_ARCHITECTURES)}",
            reason="ARCHITECTURE_UNSUPPORTED",
            got=arch,
            allowed=", ".join(FORWARD_ARCHITECTURES),
        )
    experts = gguf.integer(f"{arch}.expert_count", 0)
    if experts:
        raise ModelFileError(
            f"{gguf.path}: mixtures of experts are not supported as a drafter",
            reason="ARCHITECTURE_UNSUPPORTED",
            got=f"{experts} experts",
            allowed="0",
        )


def _vocab_size(gguf: GgufFile, arch: str) -> int:
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, StringArray):
        return len(tokens)
    return gguf.size(f"{arch}.vocab_size")
