"""Normalised rows of the residual stream, in bf16: what each matrix product of a layer reads."""

from __future__ import annotations

import numpy as np

from kernels.device import Device
from kernels.ops.checks import ROW_MULTIPLE, check, check_aligned, check_multiple, check_positive
from kernels.specialisation import Family

RMSNORM = Family("rmsnorm.cu", "rmsnorm", WARPS_PER_ROW=(1, 2, 4, 8))

WARPS = 8  # of a block of threads, as in the source
WARP_COLUMNS = 1024  # floats that a warp keeps in registers
MAX_HIDDEN = WARPS * WARP_COLUMNS


def rmsnorm(
    device: Device,
    *,
    x: int,
    weight: int,
    out: int,
    num_rows: int,
    hidden: int,
    epsilon: float,
    rows: int = 0,
) -> None:
    """Normalise rows of x to unit root mean square and scale them by `weight`.

    Args:
        x: float32 [any, hidden].
        weight: float32 [hidden].
        out: bf16 [num_rows, hidden].
        rows: int32 [num_rows], the row of x that each row of `out` comes from; 0: the same row.
    """
    check_positive("rmsnorm", num_rows=num_rows, hidden=hidden)
    check_multiple("rmsnorm", ROW_MULTIPLE, hidden=hidden)
    check(hidden <= MAX_HIDDEN, "rmsnorm", "hidden", hidden, f"at most {MAX_HIDDEN}")
    check_aligned("rmsnorm", x=x, weight=weight, out=out)
    warps = 1
    while warps * WARP_COLUMNS < hidden:
        warps *= 2
    device.launch(
        RMSNORM.source(WARPS_PER_ROW=warps),
        (-(-num_rows // (WARPS // warps)),),
        WARPS * 32,
        (x, weight, out, rows, np.int32(num_rows), np.int32(hidden), np.float32(epsilon)),
    )
