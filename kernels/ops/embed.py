"""Token ids to rows of the float32 residual stream, from a bf16 table."""

from __future__ import annotations

import numpy as np

from kernels.device import Device
from kernels.ops.checks import ROW_MULTIPLE, check_aligned, check_multiple, check_positive
from kernels.ops.threads import threads_for
from kernels.specialisation import Family

EMBED = Family("embed.cu", "embed")

ROWS = 4  # of a block of threads, as in the source
COLUMNS = 4  # of a thread


def embed(
    device: Device,
    *,
    table: int,
    ids: int,
    out: int,
    num_tokens: int,
    hidden: int,
    vocab_size: int,
) -> None:
    """Write row ids[t] of the table to row t. An id outside the table gives a row of NaN.

    Args:
        table: bf16 [vocab_size, hidden].
        ids: int32 [num_tokens].
        out: float32 [num_tokens, hidden].
    """
    check_positive("embed", num_tokens=num_tokens, hidden=hidden, vocab_size=vocab_size)
    check_multiple("embed", ROW_MULTIPLE, hidden=hidden)
    check_aligned("embed", table=table, out=out)
    device.launch(
        EMBED.source(),
        (-(-num_tokens // ROWS),),
        threads_for(hidden // COLUMNS),
        (table, ids, out, np.int32(num_tokens), np.int32(hidden), np.int32(vocab_size)),
    )
