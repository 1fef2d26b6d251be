"""The qwen3 decoder in PyTorch, as plain functions over weights that carry GGUF names.

Trains on one GPU in bfloat16 and serves as the independent truth for the exported file in
float32. The two functions around attention are compiled once for all layers (`use_compiled`),
attention itself is PyTorch's own kernel; without a compiler everything runs eagerly and only
slower.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import Arrays, round_for_shipping
from models.shapes import Qwen3Shape

EPSILON = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise the last axis in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over the two halves of the head; x is [batch, tokens, heads, head_dim]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, weights: list[Tensor], head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as [batch, heads, tokens, head_dim], k and v repeated for every query head."""
    norm, to_q, to_k, to_v, q_norm, k_norm = weights
    batch, tokens, _ = x.shape
    h = rms_norm(x, norm).to(dtype)
    q = F.linear(h, to_q.to(dtype)).view(batch, tokens, -1, head_dim)
    k = F.linear(h, to_k.to(dtype)).view(batch, tokens, -1, head_dim)
    v = F.linear(h, to_v.to(dtype)).view(batch, tokens, -1, head_dim)
    q = rotate(rms_norm(q, q_norm), cos, sin).to(dtype)
    k = rotate(rms_norm(k, k_norm), cos, sin).to(dtype)
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    return (
        q.transpose(1, 2).contiguous(),
        k.transpose(1, 2).contiguous(),
        v.transpose(1, 2).contiguous(),
    )


def after_attention(
    x: Tensor, attended: Tensor, weights: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """Add the attention's and the feed-forward's outputs to the residual stream (float32)."""
    to_output, norm, gate, up, down = weights
    joined = attended.transpose(1, 2).flatten(2)
    x = x + F.linear(joined, to_output.to(dtype)).float()
    h = rms_norm(x, norm).to(dtype)
    h = F.silu(F.linear(h, gate.to(dtype))) * F.linear(h, up.to(dtype))
    return x + F.linear(h, down.to(dtype)).float()


def token_losses(
    x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the cross-entropy of each position, [batch * tokens], float32."""
    logits = F.linear(rms_norm(x, norm).to(dtype), embedding.to(dtype))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")


class Qwen3(nn.Module):
    """The model; `forward` returns the residual stream before the last norm."""

    BEFORE = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm")
    AFTER = ("attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")

    def __init__(self, shape: Qwen3Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.weights = nn.ParameterDict()
        for name, size in shape.tensor_shapes().items():
            value = torch.ones(size) if len(size) == 1 else torch.randn(size) * 0.02
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                value /= (2 * shape.layers) ** 0.5
            self.weights[name.replace(".", "/")] = nn.Parameter(value)
        self._before: Callable[..., Any] = before_attention
        self._after: Callable[..., Any] = after_attention
        self._losses: Callable[..., Any] = token_losses

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/") + "/weight"]

    def use_compiled(self, on: bool) -> None:
        """Run training passes through torch.compile, or (for odd shapes) eagerly."""
        if on:
            torch._dynamo.config.recompile_limit = 64  # one graph per sequence length
            self._before, self._after, self._losses = _compiled()
        else:
            functions = (before_attention, after_attention, token_losses)
            self._before, self._after, self._losses = functions

    def forward(
        self, ids: Tensor, watch: Callable[[int, Tensor, Tensor], None] | None = None
    ) -> Tensor:
        """Return [batch, tokens, width]; `watch(layer, q, k)` sees each layer's rotated q and k."""
        x = F.embedding(ids, self["token_embd"])
        cos, sin = self._angles(ids.shape[1], ids.device)
        for layer in range(self.shape.layers):
            q, k, v = self._before(
                x, cos, sin, self._layer(layer, self.BEFORE), self.shape.head_dim, self.dtype
            )
            if watch:
                watch(layer, q, k)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self._after(x, attended, self._layer(layer, self.AFTER), self.dtype)
        return x

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of `targets` at every position of `x`, flat."""
        return self._losses(x, self["output_norm"], self["token_embd"], targets, self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Return float32 logits for any selection of positions (bfloat16 ones would tie)."""
        return F.linear(rms_norm(x, self["output_norm"]), self["token_embd"])

    def load_arrays(self, arrays: Arrays) -> None:
        """Copy weights in by GGUF name."""
        with torch.no_grad():
            for name, array in arrays.items():
                wide = torch.from_numpy(array.astype(np.float32))
                self.weights[name.replace(".", "/")].copy_(wide)

    def to_arrays(self) -> Arrays:
        """Return the weights rounded as they ship."""
        stored = {n.replace("/", "."): p.detach().cpu().numpy() for n, p in self.weights.items()}
        return round_for_shipping({name: stored[name] for name in self.shape.tensor_shapes()})

    def _layer(self, layer: int, names: tuple[str, ...]) -> list[Tensor]:
        return [self[f"blk.{layer}.{name}"] for name in names]

    def _angles(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        half = self.shape.head_dim // 2
        exponents = torch.arange(half, device=device, dtype=torch.float64) / half
        angles = torch.outer(
            torch.arange(tokens, device=device, dtype=torch.float64),
            self.shape.rope_base**-exponents,
        )
        return angles.cos().float()[None, :, None], angles.sin().float()[None, :, None]


_COMPILED: list[Callable[..., Any]] = []


def _compiled() -> list[Callable[..., Any]]:
    if not _COMPILED:
        functions = (before_attention, after_attention, token_losses)
        _COMPILED.extend(torch.compile(f, dynamic=False) for f in functions)
    return _COMPILED
