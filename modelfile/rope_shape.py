"""Rotary positions as a model file states them: base, pairing, scaling, sections.

Part of `modelfile.hparams.ModelShape`. Only reads and checks; the frequencies themselves are the
forward pass's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from modelfile.gguf_file import GgufFile
from skim.errors import ModelFileError

RopeKind = Literal["none", "linear", "yarn", "llama3", "longrope"]
# Which two components of a head a rope frequency turns: i and i + d/2, or 2i and 2i + 1.
RopePairing = Literal["halves", "interleaved"]


@dataclass(frozen=True, slots=True)
class RopeShape:
    """Rotary positions, as the file states them.

    Attributes:
        freq_base: theta; frequency i is freq_base ** (-2 i / dimension_count).
        dimension_count: leading components of a head that turn.
        pairing: "halves" (i with i + dimension_count / 2), or "interleaved" (2i with 2i + 1).
        kind: "none"; "linear" (positions divided by `factor`); "yarn"; "llama3" (`freq_factors`);
            "longrope" (llama.cpp only).
        factor: context extension of linear and YaRN, >= 1; 1 otherwise.
        original_context: tokens the model was trained for before YaRN.
        attention_factor: extra factor on YaRN's magnitude scale (1 unless the file states it).
        beta_fast, beta_slow: YaRN's ramp, in turns over the original context.
        freq_factors: float per frequency, divides it (Llama 3's `rope_freqs.weight`); else None.
        sections: components per position axis of M-RoPE, or None. Present: llama.cpp accepts
            positions with gaps.
    """

    freq_base: float
    dimension_count: int
    pairing: RopePairing
    kind: RopeKind
    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    freq_factors: tuple[float, ...] | None
    sections: tuple[int, ...] | None


def read_rope(gguf: GgufFile, arch: str, head_dim: int) -> RopeShape:
    """Read the rope keys of architecture `arch` (ModelFileError: unknown or impossible values)."""
    key = f"{arch}.rope."
    dimension_count = gguf.size(key + "dimension_count", head_dim)
    stated = gguf.text(key + "scaling.type", "linear")
    if stated not in ("none", "linear", "yarn", "longrope"):
        raise ModelFileError(
            f"{gguf.path}: rope scaling {stated!r} is not known",
            got=stated,
            allowed="none, linear, yarn, longrope",
        )
    # A factor of 0 stands for "not stated", as in llama.cpp; the second key is the older name.
    factor = gguf.number(key + "scaling.factor", 0.0) or gguf.number(key + "scale_linear", 0.0)
    factor = 1.0 if stated == "none" or factor == 0.0 else factor
    kind: RopeKind = "none"
    if stated in ("yarn", "longrope"):
        kind = cast(RopeKind, stated)
    elif stated == "linear" and factor != 1.0:
        kind = "linear"
    freq_factors = None
    if arch == "llama" and "rope_freqs.weight" in gguf.tensors:
        freq_factors = _freq_factors(gguf, dimension_count)
        kind = "llama3" if kind == "none" else kind
    context = gguf.size(f"{arch}.context_length")
    sections = None
    if isinstance(gguf.metadata.get(key + "dimension_sections"), np.ndarray):
        sections = tuple(int(size) for size in gguf.integers(key + "dimension_sections"))
    rope = RopeShape(
        freq_base=gguf.number(key + "freq_base", 10000.0),
        dimension_count=dimension_count,
        pairing="interleaved" if arch == "llama" else "halves",
        kind=kind,
        factor=factor,
        original_context=gguf.size(key + "scaling.original_context_length", context),
        attention_factor=gguf.number(key + "scaling.attn_factor", 1.0),
        beta_fast=gguf.number(key + "scaling.yarn_beta_fast", 32.0),
        beta_slow=gguf.number(key + "scaling.yarn_beta_slow", 1.0),
        freq_factors=freq_factors,
        sections=sections,
    )
    if rope.freq_base <= 0 or rope.factor <= 0:
        raise ModelFileError(
            f"{gguf.path}: rope base and factor must be positive",
            got=f"base {rope.freq_base}, factor {rope.factor}",
            allowed="> 0",
        )
    return rope


def _freq_factors(gguf: GgufFile, dimension_count: int) -> tuple[float, ...]:
    info = gguf.info("rope_freqs.weight")
    if info.shape != (dimension_count // 2,) or info.dtype != "F32":
        raise ModelFileError(
            f"{gguf.path}: tensor 'rope_freqs.weight' must be F32 [{dimension_count // 2}]",
            got=f"{info.dtype} {list(info.shape)}",
            allowed=f"F32 [{dimension_count // 2}]",
        )
    values = gguf.tensor("rope_freqs.weight")
    if not np.all(np.isfinite(values)) or not np.all(values > 0):
        raise ModelFileError(f"{gguf.path}: 'rope_freqs.weight' must be positive and finite")
    return tuple(float(value) for value in values)
