"""Write a GGUF with random weights in the shape of a real drafter: for timing, never for answers.

The file has no vocabulary, only its size: ids are drawn, nothing is tokenised. Matrices are bf16,
scaled so that activations keep unit size; they are slices of one random pool, so a 1.2 GB file
takes about two seconds. Written without any package but NumPy.

    python -m bench.random_model qwen3-0.6b /dev/shm/drafter.gguf
"""

from __future__ import annotations

import argparse
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from kernels.reference import round_to_bf16

ALIGNMENT = 32
POOL_VALUES = 1 << 24
_F32, _BF16 = 0, 30  # ggml's numbers of the types


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
    path: str | Path, shape: RandomShape, *, layers: int | None = None, seed: int = 0
) -> Path:
    """Write one file.

    Args:
        layers: instead of the shape's own.
        seed: of the pool and of where each tensor lies in it.
    """
    shape = replace(shape, layers=layers or shape.layers)
    tensors = _tensors(shape)
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(POOL_VALUES, dtype=np.float32)
    pools = {gain: _to_bf16(pool * np.float32(gain)) for gain in {gain for *_, gain in tensors}}
    with Path(path).open("wb") as out:
        _write_header(out, shape, tensors)
        for name, dims, gain in tensors:
            _pad(out)
            if name == "rope_freqs.weight":
                out.write(llama3_divisors(shape.head_dim, shape.freq_base).tobytes())
            elif len(dims) == 1:
                out.write(np.ones(dims, dtype=np.float32).tobytes())
            else:
                _write_matrix(out, pools[gain], int(np.prod(dims)), rng)
    return Path(path)


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


def _write_matrix(
    out: BinaryIO, bits: NDArray[np.uint16], count: int, rng: np.random.Generator
) -> None:
    """Write `count` bf16 values, read from the pool round and round from a random place."""
    start = int(rng.integers(bits.size))
    while count:
        piece = bits[start : start + count]
        out.write(piece.tobytes())
        count -= piece.size
        start = 0


def _write_header(
    out: BinaryIO, shape: RandomShape, tensors: list[tuple[str, tuple[int, ...], float]]
) -> None:
    arch = shape.arch
    keys: dict[str, str | int | float] = {
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
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    for key, value in keys.items():
        out.write(_string(key))
        if isinstance(value, str):
            out.write(struct.pack("<I", 8) + _string(value))
        elif isinstance(value, int):
            out.write(struct.pack("<II", 4, value))
        else:
            out.write(struct.pack("<If", 6, value))
    offset = 0
    for name, dims, _ in tensors:
        kind, size = (_F32, 4) if len(dims) == 1 else (_BF16, 2)
        sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *reversed(dims))
        out.write(_string(name) + sizes + struct.pack("<IQ", kind, offset))
        offset += -(-int(np.prod(dims)) * size // ALIGNMENT) * ALIGNMENT
    _pad(out)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % ALIGNMENT))


def main() -> int:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.random_model", description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = write_random_gguf(
        options.path, SHAPES[options.shape], layers=options.layers, seed=options.seed
    )
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
