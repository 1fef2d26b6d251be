"""A trained model on disk before it becomes a GGUF: one .npz of at most 16 MiB, no pickles.

Matrices are float16 and norms float32, and these very numbers are the model: the PyTorch check
and every export start from them, so that rounding happens once.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.shapes import SHAPES, Qwen3Shape

Arrays = dict[str, NDArray[Any]]


def round_for_shipping(arrays: Arrays) -> Arrays:
    """Return matrices as float16 and vectors (norms) as float32."""
    return {n: a.astype(np.float16 if a.ndim == 2 else np.float32) for n, a in arrays.items()}


def save_checkpoint(path: Path, shape: Qwen3Shape, arrays: Arrays, notes: dict[str, Any]) -> None:
    """Write atomically; `notes` (steps, seconds, accuracy) is stored as JSON beside the arrays."""
    meta = np.frombuffer(json.dumps({"model": shape.name, **notes}).encode(), np.uint8)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, __notes__=meta, **round_for_shipping(arrays))  # type: ignore[arg-type]
    partial.replace(path)


def load_checkpoint(path: Path) -> tuple[Qwen3Shape, Arrays, dict[str, Any]]:
    """Return shape, arrays and notes. Raises ValueError when a tensor is missing or misshapen."""
    with np.load(path, allow_pickle=False) as stored:
        notes = json.loads(stored["__notes__"].tobytes())
        arrays = {name: stored[name] for name in stored.files if name != "__notes__"}
    shape = SHAPES[notes["model"]]
    got = {name: array.shape for name, array in arrays.items()}
    if got != shape.tensor_shapes():
        raise ValueError(f"{path}: tensors differ from those of {shape.name}")
    return shape, arrays, notes


def random_arrays(shape: Qwen3Shape, seed: int) -> Arrays:
    """Return untrained weights of a sane scale: normal 0.02, norms 1."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(size) * 0.02 if len(size) == 2 else np.ones(size)).astype(
            np.float32
        )
        for name, size in shape.tensor_shapes().items()
    }
