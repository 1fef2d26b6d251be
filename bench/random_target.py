"""Write a target with random quantised weights in the shape of Qwen3.6-27B, tokenizer included.

For timing, never for answers: the matrices are random blocks of Q4_K and Q6_K with sane scales (as
in the usual mix: `attn_v`, the output and every other `ffn_down` are Q6_K), so a prefill costs what
that model's costs. The vocabulary is `bench.vocabulary`'s, so that whole services run. 16 GB, some
seconds on a RAM disk with 16 cores; `small` has the same layers in a size that a CPU runs.

    python -m bench.random_target 27b /dev/shm/target.gguf
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.gguf_out import OutTensor, Value, write_gguf
from bench.vocabulary import Vocabulary, learn

POOL_BLOCKS = 1 << 17  # random blocks of each type that all matrices are cut from
WEIGHT_STD = 0.02
ROPE_DIMENSIONS, ROPE_SECTIONS = 64, (11, 11, 10, 0)


@dataclass(frozen=True)
class TargetShape:
    """Sizes of a qwen35: three layers of gated delta net, then one of attention, and so on.

    `ssm_heads` value heads and `ssm_groups` key heads of `ssm_state` components each.
    """

    layers: int
    embed: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    ssm_heads: int
    ssm_groups: int
    ssm_state: int = 128
    conv_kernel: int = 4
    attention_every: int = 4
    context_length: int = 262_144
    freq_base: float = 1e7

    @property
    def ssm_inner(self) -> int:
        """Width of the delta net's values."""
        return self.ssm_heads * self.ssm_state


SHAPES = {
    "27b": TargetShape(64, 5120, 17_408, 24, 4, 256, 248_320, ssm_heads=48, ssm_groups=16),
    "small": TargetShape(4, 256, 512, 2, 1, 256, 9_216, ssm_heads=4, ssm_groups=2),
}


def write_random_target(
    path: str | Path, shape: TargetShape, vocabulary: Vocabulary, *, seed: int = 0
) -> Path:
    """Write one file; `seed` draws the blocks and where each matrix lies in them."""
    tensors = tensors_of(shape, np.random.default_rng(seed))
    return write_gguf(path, _metadata(shape, vocabulary), tensors)


def tensors_of(shape: TargetShape, rng: np.random.Generator) -> list[OutTensor]:
    """List every tensor, its bytes cut from two pools."""
    tensors = _Tensors(rng)
    embed, attended = shape.embed, shape.heads * shape.head_dim
    tensors.matrix("token_embd.weight", shape.vocab_size, embed)
    tensors.vector("output_norm.weight", embed)
    tensors.matrix("output.weight", shape.vocab_size, embed, "Q6_K")
    for layer in range(shape.layers):
        tensors.block = f"blk.{layer}."
        tensors.vector("attn_norm.weight", embed)
        tensors.vector("post_attention_norm.weight", embed)
        if (layer + 1) % shape.attention_every == 0:
            tensors.matrix("attn_q.weight", 2 * attended, embed)  # queries and their gate
            tensors.matrix("attn_k.weight", shape.kv_heads * shape.head_dim, embed)
            tensors.matrix("attn_v.weight", shape.kv_heads * shape.head_dim, embed, "Q6_K")
            tensors.matrix("attn_output.weight", embed, attended)
            tensors.vector("attn_q_norm.weight", shape.head_dim)
            tensors.vector("attn_k_norm.weight", shape.head_dim)
        else:
            _delta_net(tensors, shape, rng)
        tensors.matrix("ffn_gate.weight", shape.ffn, embed)
        tensors.matrix("ffn_up.weight", shape.ffn, embed)
        tensors.matrix("ffn_down.weight", embed, shape.ffn, "Q6_K" if layer % 2 else "Q4_K")
    return tensors.all


def _delta_net(tensors: _Tensors, shape: TargetShape, rng: np.random.Generator) -> None:
    """Add what a layer of gated delta net has in an attention's place."""
    embed, inner = shape.embed, shape.ssm_inner
    channels = inner + 2 * shape.ssm_groups * shape.ssm_state
    taps = 0.3 * rng.standard_normal((channels, shape.conv_kernel), dtype=np.float32)
    tensors.matrix("attn_qkv.weight", channels, embed)
    tensors.matrix("attn_gate.weight", inner, embed)
    tensors.floats("ssm_conv1d.weight", taps)
    tensors.vector("ssm_dt.bias", shape.ssm_heads, 0.0)
    tensors.vector("ssm_a", shape.ssm_heads, -1.0)
    tensors.matrix("ssm_beta.weight", shape.ssm_heads, embed)
    tensors.matrix("ssm_alpha.weight", shape.ssm_heads, embed)
    tensors.vector("ssm_norm.weight", shape.ssm_state)
    tensors.matrix("ssm_out.weight", embed, inner)


class _Tensors:
    """The tensors so far; `block` is put in front of the next ones' names."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.all: list[OutTensor] = []
        self.block = ""
        self._rng = rng
        self._pools = {"Q4_K": _q4_k(rng), "Q6_K": _q6_k(rng)}

    def matrix(self, name: str, rows: int, columns: int, kind: str = "Q4_K") -> None:
        """Add random blocks, from a random one on."""
        pool = self._pools[kind]
        start = int(self._rng.integers(POOL_BLOCKS)) * pool.shape[1]
        data = pool.reshape(-1)
        self.all.append(OutTensor(self.block + name, (rows, columns), kind, data, start))

    def vector(self, name: str, size: int, value: float = 1.0) -> None:
        """Add `size` equal floats."""
        self.floats(name, np.full(size, value, np.float32))

    def floats(self, name: str, values: NDArray[np.float32]) -> None:
        """Add an array of floats."""
        data = values.reshape(-1).view(np.uint8)
        self.all.append(OutTensor(self.block + name, values.shape, "F32", data))


def _half(value: float) -> NDArray[np.uint8]:
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def _q4_k(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blocks uint8 [POOL_BLOCKS, 144]: two scales, 12 bytes of packed sub-scales, 128 of quants.

    All sub-scales and minima are 32 of 63; quants are even on 0 to 15, so their mean is 7.5 and
    their standard deviation 4.61: w = d * 32 * q - dmin * 32 is centred, with the wanted spread.
    """
    blocks = rng.integers(0, 256, (POOL_BLOCKS, 144), dtype=np.uint8)
    scale = WEIGHT_STD / (32 * 4.61)
    blocks[:, 0:2], blocks[:, 2:4] = _half(scale), _half(7.5 * scale)
    # Sub-scales 0 to 3 and minima 0 to 3 lie in the low six bits of the first eight bytes, the
    # upper two bits of sub-scales and minima 4 to 7 above them, their low four in the last four.
    blocks[:, 4:12], blocks[:, 12:16] = 32 | 2 << 6, 0
    return blocks


def _q6_k(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blocks uint8 [POOL_BLOCKS, 210]: 192 of quants, 16 sub-scales (all 16), one scale.

    Quants are even on -32 to 31: standard deviation 18.5.
    """
    blocks = rng.integers(0, 256, (POOL_BLOCKS, 210), dtype=np.uint8)
    blocks[:, 192:208], blocks[:, 208:210] = 16, _half(WEIGHT_STD / (16 * 18.5))
    return blocks


def _metadata(shape: TargetShape, vocabulary: Vocabulary) -> dict[str, Value]:
    sizes: dict[str, Value] = {
        "block_count": shape.layers,
        "context_length": shape.context_length,
        "embedding_length": shape.embed,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": shape.freq_base,
        "rope.dimension_count": ROPE_DIMENSIONS,
        "rope.dimension_sections": ROPE_SECTIONS,
        "full_attention_interval": shape.attention_every,
        "ssm.conv_kernel": shape.conv_kernel,
        "ssm.inner_size": shape.ssm_inner,
        "ssm.state_size": shape.ssm_state,
        "ssm.time_step_rank": shape.ssm_heads,
        "ssm.group_count": shape.ssm_groups,
    }
    keys: dict[str, Value] = {"general.architecture": "qwen35"}
    keys |= {f"qwen35.{key}": value for key, value in sizes.items()}
    return keys | vocabulary.metadata(shape.vocab_size, "qwen35")


def main() -> int:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.random_target",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began_s = time.monotonic()
    path = write_random_target(options.path, SHAPES[options.shape], learn(), seed=options.seed)
    print(f"{path}: {path.stat().st_size:,} bytes in {time.monotonic() - began_s:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
