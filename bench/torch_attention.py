"""The baseline of `bench.attention`: PyTorch's causal attention on random data, cuDNN's kernel."""

from __future__ import annotations

import importlib
import statistics
from typing import Any

from bench.attention_layer import Shape


def why_not() -> str | None:
    """Why there can be no baseline here, or None."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def seconds(shape: Shape, num_tokens: int, launches: int) -> dict[str, Any]:
    """Time the kernel alone; KV heads are repeated beforehand, so that no group costs anything.

    Returns:
        seconds (median by events), by (the kernel that ran).
    """
    torch: Any = importlib.import_module("torch")
    kernels: Any = importlib.import_module("torch.nn.attention")
    refusals = []
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        try:
            with torch.inference_mode(), kernels.sdpa_kernel(getattr(kernels.SDPBackend, name)):
                times = _times(torch, shape, num_tokens, launches)
        except RuntimeError as error:
            refusals.append(f"{name}: {error}")
            continue
        torch.cuda.empty_cache()
        return {"seconds": statistics.median(times), "by": name, "launches": launches}
    raise RuntimeError("; ".join(refusals))


def _times(torch: Any, shape: Shape, num_tokens: int, launches: int) -> list[float]:
    torch.manual_seed(0)
    size = (1, shape.num_heads, num_tokens, shape.head_dim)
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    marks = []
    for _ in range(launches + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in marks[3:]]
