"""The baseline of `bench.drafter`: the same shape as a dense PyTorch model, no vocabulary matrix.

`transformers` builds it with random bf16 weights; attention is PyTorch's own, cuDNN's kernel where
that runs and PyTorch's choice where it does not. A machine without either package has no baseline,
and the answer says so.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.random_model import RandomShape

CLASSES = {"qwen3": ("Qwen3Config", "Qwen3Model"), "llama": ("LlamaConfig", "LlamaModel")}


def why_not() -> str | None:
    """Why there can be no baseline here, or None."""
    for name in ("torch", "transformers"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} cannot be imported ({error})"
    torch: Any = importlib.import_module("torch")
    return None if torch.cuda.is_available() else "torch sees no GPU"


class DenseModel:
    """A random model of a shape, dense, in PyTorch.

    Args:
        layers: instead of the shape's own.
        device: torch's name of where it runs.
    """

    def __init__(
        self, shape: RandomShape, *, layers: int | None = None, device: str = "cuda"
    ) -> None:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        config_class, model_class = CLASSES[shape.arch]
        config = getattr(transformers, config_class)(
            vocab_size=shape.vocab_size,
            hidden_size=shape.embed,
            intermediate_size=shape.ffn,
            num_hidden_layers=layers or shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=1 << 20,
            rms_norm_eps=shape.rms_eps,
            use_cache=False,
            attn_implementation="sdpa",
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                self._model = getattr(transformers, model_class)(config).eval()
        finally:
            torch.set_default_dtype(before)
        self._torch, self._device, self._vocab = torch, device, shape.vocab_size

    def seconds(self, num_tokens: int, passes: int, *, seed: int = 0) -> dict[str, Any]:
        """Time whole passes, one after a warm-up.

        Returns:
            seconds (median of the passes), passes_s, attention (the kernel that ran).
        """
        ids = np.random.default_rng(seed).integers(0, self._vocab, (1, num_tokens))
        tokens = self._torch.from_numpy(ids).to(self._device)
        attention = "torch's choice"
        if self._device.startswith("cuda"):
            attention = "cuDNN"
        try:
            passes_s = self._run(tokens, passes, attention)
        except RuntimeError:  # no cuDNN kernel for this shape or this build
            attention = "torch's choice"
            passes_s = self._run(tokens, passes, attention)
        return {"seconds": statistics.median(passes_s), "passes_s": passes_s, "by": attention}

    def _run(self, tokens: Any, passes: int, attention: str) -> list[float]:
        seconds = []
        with self._torch.inference_mode(), self._kernel(attention):
            for _ in range(passes + 1):
                self._wait()
                began = time.perf_counter()
                self._model(input_ids=tokens)
                self._wait()
                seconds.append(time.perf_counter() - began)
        return seconds[1:]

    @contextlib.contextmanager
    def _kernel(self, attention: str) -> Iterator[None]:
        if attention != "cuDNN":
            yield
            return
        kernels: Any = importlib.import_module("torch.nn.attention")
        with kernels.sdpa_kernel(kernels.SDPBackend.CUDNN_ATTENTION):
            yield

    def _wait(self) -> None:
        if self._device.startswith("cuda"):
            self._torch.cuda.synchronize()

    def close(self) -> None:
        """Let the weights and torch's cached memory go."""
        del self._model
        if self._device.startswith("cuda"):
            self._torch.cuda.empty_cache()
