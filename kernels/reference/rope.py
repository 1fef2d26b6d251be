"""Rotary positions in the half-split (NEOX) layout, with linear, YaRN and Llama 3 scaling.

Pairs are (x_i, x_{i + d/2}). Weights written for the interleaved layout are reordered once at load
(`drafter_svc/architecture.py`): queries and keys are only ever compared with each other, so a
permutation common to both changes nothing.

Sources: RoFormer (arXiv:2104.09864), YaRN (arXiv:2309.00071).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RopeScaling:
    """How positions past the trained context are mapped back into it.

    Attributes:
        kind: `none`, `linear` (every frequency divided by `factor`) or `yarn` (only the slow ones).
        factor: context extension, at least 1.
        original_context: tokens the model was trained on; yarn needs it.
        beta_fast, beta_slow: rotations within `original_context` at which a frequency is kept
            whole (at least beta_fast) or divided in full (at most beta_slow).
        attention_factor: multiplies yarn's own 0.1 ln(factor) + 1, which scales queries and keys.
    """

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


def rope_frequencies(
    head_dim: int,
    base: float,
    scaling: RopeScaling,
    frequency_divisors: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float64], float]:
    """Give the angle per position of each pair, and the magnitude of the rotation.

    Args:
        frequency_divisors: [head_dim / 2], Llama 3's table (`rope_freqs.weight`), or None.
    Returns:
        (float64 [head_dim / 2] radians per position, magnitude).
    """
    pair = np.arange(head_dim // 2)
    frequencies = base ** (-2.0 * pair / head_dim)
    if frequency_divisors is not None:
        frequencies = frequencies / frequency_divisors.astype(np.float64)
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind != "yarn":
        return frequencies, 1.0

    def pair_with(rotations: float) -> float:
        """Index of the pair that turns `rotations` times within the original context."""
        wavelength_ratio = scaling.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength_ratio) / (2 * math.log(base))

    low = max(0.0, math.floor(pair_with(scaling.beta_fast)))
    high = min(head_dim - 1.0, math.ceil(pair_with(scaling.beta_slow)))
    keep = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
    frequencies = frequencies * keep + frequencies / scaling.factor * (1.0 - keep)
    magnitude = scaling.attention_factor * (1.0 + 0.1 * math.log(scaling.factor))
    return frequencies, magnitude


def rope_tables(
    positions: NDArray[np.int64],
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
    frequency_divisors: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tabulate magnitude x (cosine, sine), each float32 [num_positions, head_dim / 2].

    Angles are float64: at position 131,072 a float32 angle is off by 0.008 radians.
    """
    frequencies, magnitude = rope_frequencies(
        head_dim, base, scaling or RopeScaling(), frequency_divisors
    )
    angles = positions.astype(np.float64)[:, None] * frequencies[None, :]
    cosine = (magnitude * np.cos(angles)).astype(np.float32)
    sine = (magnitude * np.sin(angles)).astype(np.float32)
    return cosine, sine


def apply_rope(
    x: NDArray[np.float32], cosine: NDArray[np.float32], sine: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Rotate [..., num_positions, head_dim] by tables [num_positions, head_dim / 2]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    rotated = np.empty_like(x)
    rotated[..., :half] = first * cosine - second * sine
    rotated[..., half:] = first * sine + second * cosine
    return rotated
