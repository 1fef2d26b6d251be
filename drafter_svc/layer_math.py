"""What one layer does to a chunk of rows, attention aside: project, rotate, feed forward.

Rows are positions; every function takes a contiguous chunk of them so that activations stay small
and the threads of the CPU backend can share the sequence out. float32 throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drafter_svc.architecture import DrafterWeights, LayerWeights, Matrix
from kernels.reference import apply_rope, rmsnorm, silu_mul
from modelfile.hparams import ModelShape


def normed(x: Matrix, layer: LayerWeights, shape: ModelShape) -> Matrix:
    """The attention input of rows [num_rows, embed]."""
    return rmsnorm(x, layer.attention_norm, shape.rms_eps)


def project(
    y: Matrix, layer: LayerWeights, shape: ModelShape, first_head: int, num_heads: int
) -> Matrix:
    """Project normed rows onto some of the stacked heads: queries, then keys, then values.

    Returns:
        [num_rows, num_heads, head_dim]: heads [first_head, first_head + num_heads) of the stack.
    """
    rows = slice(first_head * shape.head_dim, (first_head + num_heads) * shape.head_dim)
    heads = y @ layer.qkv[rows].T
    if layer.qkv_bias is not None:
        heads += layer.qkv_bias[rows]
    return heads.reshape(y.shape[0], num_heads, shape.head_dim)


def rotate(
    heads: Matrix,
    layer: LayerWeights,
    shape: ModelShape,
    first_head: int,
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> Matrix:
    """Normalise query or key heads where the model does, and turn them to their positions.

    Args:
        heads: [num_rows, some heads of the stack from `first_head`, head_dim].
        cosine, sine: [num_rows, head_dim / 2].
    """
    if layer.head_norm is not None:
        norm = layer.head_norm[first_head : first_head + heads.shape[1]]
        heads = rmsnorm(heads, norm, shape.rms_eps)
    return apply_rope(heads, cosine[:, None, :], sine[:, None, :])


def feed_forward(x: Matrix, attended: Matrix, layer: LayerWeights, shape: ModelShape) -> None:
    """Finish a layer: add the attention's output and the feed-forward to rows `x`, in place.

    Args:
        x: [num_rows, embed].
        attended: [num_rows, num_heads * head_dim].
    """
    x += attended @ layer.attention_output.T
    y = rmsnorm(x, layer.mlp_norm, shape.rms_eps)
    both = y @ layer.gate_up.T
    x += silu_mul(both[:, : shape.ffn], both[:, shape.ffn :]) @ layer.down.T


def logits(x: Matrix, weights: DrafterWeights) -> Matrix:
    """Score the vocabulary: final norm and output matrix on rows [num_rows, embed]."""
    return rmsnorm(x, weights.output_norm, weights.shape.rms_eps) @ weights.output.T
