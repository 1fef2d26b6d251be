"""One GPU from both sides, and what tests of shared memory read and write with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.device import Device, Window
from kernels.ipc.physical import Physical

SIZE = 4 << 20


@dataclass(frozen=True)
class SharedGpu:
    """One GPU: as the landlord of its memory sees it, and as a tenant does."""

    physical: Physical
    device: Device


def random_bytes(count: int, seed: int = 11) -> NDArray[np.uint8]:
    """No zero among them: new memory is zero."""
    return np.random.default_rng(seed).integers(1, 256, count, np.uint8)


def content(gpu: SharedGpu, window: Window, begin: int = 0, count: int = SIZE) -> NDArray[np.uint8]:
    """What lies behind a window, in the order of the work."""
    out = np.empty(count, np.uint8)
    gpu.device.download(window.address + begin, out)
    return out
