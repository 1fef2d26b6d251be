"""Write a GGUF with random weights in the shape of a real drafter: for timing, never for answers.

Unless `bench.vocabulary` gives one, the file has no vocabulary, only its size: ids are drawn,
nothing is tokenised. Matrices are bf16, scaled so that activations keep unit size; they are slices
of one random pool, so a 1.2 GB file takes about two seconds.

    python -m bench.random_model qwen3-0.6b /dev/shm/drafter.gguf
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.gguf_out import OutTensor, Value, write_gguf
from kernels.reference import round_to_bf16

if TYPE_CHECKING:
    from bench.vocabulary import Vocabulary

POOL_VALUES = 1 << 24


@dataclass(frozen=True)
class RandomShape:
    """Sizes of a model; `rope_freqs` asks for Llama 3's table."""

    arch: str
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    rms_eps: float
    freq_base: float
    context_length: int
    rope_freqs: bool = False


SHAPES = {
    "qwen3-0.6b": RandomShape(
        "qwen3", 28, 1024, 16, 8, 128, 3072, 151_936, 1e-6, 1e6, context_length=40_960
    ),
    "qwen3-1.7b": RandomShape(
        "qwen3", 28, 2048, 16, 8, 128, 6144, 151_936, 1e-6, 1e6, context_length=40_960
    ),
    # For benchmarks that a CPU runs whole, beside `bench.random_target`'s of the same name.
    "small": RandomShape("qwen3", 4, 128, 2, 1, 64, 256, 9_216, 1e-6, 1e6, context_length=40_960),
    "llama-3.2-1b": RandomShape(
        "llama", 16, 2048, 32, 8, 64, 8192, 128_256, 1e-5, 5e5, 131_072, rope_freqs=True
    ),
}


def llama3_divisors(head_dim: int, base: float) -> NDArray[np.float32]:
    """Llama 3.2's table: factor 32, 8,192 original positions, low and high frequency 1 and 4."""
    frequencies = base ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    turns = 8192 * frequencies / (2 * np.pi)
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / 32.0 + smooth)).astype(np.float32)


def write_random_gguf(
    path: str | Path,
    shape: RandomShape,
    *,
    layers: int | None = None,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
) -> Path:
    """Write one file.

    Args:
        layers: instead of the shape's own.
        seed: of the pool and of where each tensor lies in it.
        vocabulary: a tokenizer for the file, padded to the shape's size; None: none, ids are drawn.
    """
    shape = replace(shape, layers=layers or shape.layers)
    tensors = _tensors(shape)
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(POOL_VALUES, dtype=np.float32)
    pools = {gain: _to_bf16(pool * np.float32(gain)) for gain in {gain for *_, gain in tensors}}

    def tensor(name: str, dims: tuple[int, ...], gain: float) -> OutTensor:
        if name == "rope_freqs.weight":
            return OutTensor(
                name, dims, "F32", _bytes(llama3_divisors(shape.head_dim, shape.freq_base))
            )
        if len(dims) == 1:
            return OutTensor(name, dims, "F32", _bytes(np.ones(dims, dtype=np.float32)))
        start = 2 * int(rng.integers(POOL_VALUES))
        return OutTensor(name, dims, "BF16", _bytes(pools[gain]), start)

    return write_gguf(path, _metadata(shape, vocabulary), [tensor(*entry) for entry in tensors])


def _tensors(shape: RandomShape) -> list[tuple[str, tuple[int, ...], float]]:
    """Name, NumPy shape and standard deviation of every tensor."""
    embed, ffn = shape.embed, shape.ffn
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: list[tuple[str, tuple[int, ...], float]] = [
        ("token_embd.weight", (shape.vocab_size, embed), 1.0),
        ("output_norm.weight", (embed,), 1.0),
    ]
    if shape.rope_freqs:
        tensors.append(("rope_freqs.weight", (shape.head_dim // 2,), 1.0))
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        tensors += [
            (block + "attn_norm.weight", (embed,), 1.0),
            (block + "attn_q.weight", (q_width, embed), embed**-0.5),
            (block + "attn_k.weight", (kv_width, embed), embed**-0.5),
            (block + "attn_v.weight", (kv_width, embed), embed**-0.5),
            (block + "attn_output.weight", (embed, q_width), q_width**-0.5),
            (block + "ffn_norm.weight", (embed,), 1.0),
            (block + "ffn_gate.weight", (ffn, embed), embed**-0.5),
            (block + "ffn_up.weight", (ffn, embed), embed**-0.5),
            (block + "ffn_down.weight", (embed, ffn), ffn**-0.5),
        ]
        if shape.arch == "qwen3":
            tensors.append((block + "attn_q_norm.weight", (shape.head_dim,), 1.0))
            tensors.append((block + "attn_k_norm.weight", (shape.head_dim,), 1.0))
    return tensors


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (round_to_bf16(values).view(np.uint32) >> 16).astype("<u2")


def _bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


def _metadata(shape: RandomShape, vocabulary: Vocabulary | None) -> dict[str, Value]:
    arch = shape.arch
    keys: dict[str, Value] = {
        "general.architecture": arch,
        f"{arch}.block_count": shape.layers,
        f"{arch}.context_length": shape.context_length,
        f"{arch}.embedding_length": shape.embed,
        f"{arch}.feed_forward_length": shape.ffn,
        f"{arch}.attention.head_count": shape.heads,
        f"{arch}.attention.head_count_kv": shape.kv_heads,
        f"{arch}.attention.key_length": shape.head_dim,
        f"{arch}.attention.value_length": shape.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": shape.rms_eps,
        f"{arch}.rope.freq_base": shape.freq_base,
        f"{arch}.vocab_size": shape.vocab_size,
    }
    if vocabulary is not None:
        keys |= vocabulary.metadata(shape.vocab_size, "qwen2")
    return keys


def main() -> int:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.random_model", description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", action="store_true", help="write a vocabulary, too")
    options = parser.parse_args()
    vocabulary = None
    if options.tokenizer:
        from bench.vocabulary import learn  # the drawn ids of most benchmarks need no library

        vocabulary = learn()
    path = write_random_gguf(
        options.path,
        SHAPES[options.shape],
        layers=options.layers,
        seed=options.seed,
        vocabulary=vocabulary,
    )
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
