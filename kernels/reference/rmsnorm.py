"""Root-mean-square normalisation, over hidden rows and (QK-norm) over each head's own vector."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rmsnorm(
    x: NDArray[np.float32], weight: NDArray[np.float32], epsilon: float
) -> NDArray[np.float32]:
    """Scale the last axis to unit root mean square, then by `weight` [size of the last axis]."""
    mean_square = np.einsum("...d,...d->...", x, x)[..., None] / np.float32(x.shape[-1])
    return np.asarray(x * (1.0 / np.sqrt(mean_square + np.float32(epsilon))) * weight)
