"""Round float32 to the nearest bfloat16, kept in float32: what a kernel's bf16 store does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to 8 significant bits, ties to even. Finite input only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
