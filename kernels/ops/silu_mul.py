"""The gate of the feed-forward, in place over the gate half of its rows."""

from __future__ import annotations

import numpy as np

from kernels.device import Device
from kernels.ops.checks import ROW_MULTIPLE, check_aligned, check_multiple, check_positive
from kernels.ops.threads import threads_for
from kernels.specialisation import Family

SILU_MUL = Family("silu_mul.cu", "silu_mul")

ROWS = 4  # of a block of threads, as in the source


def silu_mul(device: Device, *, gate_up: int, num_rows: int, ffn: int) -> None:
    """Replace each row's gate half by silu(gate) * up; the product after reads rows 2 * ffn apart.

    Args:
        gate_up: bf16 [num_rows, 2 * ffn].
    """
    check_positive("silu_mul", num_rows=num_rows, ffn=ffn)
    check_multiple("silu_mul", ROW_MULTIPLE, ffn=ffn)
    check_aligned("silu_mul", gate_up=gate_up)
    device.launch(
        SILU_MUL.source(),
        (-(-num_rows // ROWS),),
        threads_for(ffn // ROW_MULTIPLE),
        (gate_up, np.int32(num_rows), np.int32(ffn)),
    )
