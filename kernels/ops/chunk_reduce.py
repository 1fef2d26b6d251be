"""One score a chunk, from the running maximum of each query and token, after the last layer."""

from __future__ import annotations

import numpy as np

from kernels.device import Device
from kernels.ops.checks import check_positive
from kernels.specialisation import Family

CHUNK_REDUCE = Family("chunk_reduce.cu", "chunk_reduce")

WARPS = 8  # of a block of threads, as in the source; each has one chunk


def chunk_reduce(
    device: Device,
    *,
    running_max: int,
    out: int,
    num_queries: int,
    num_prompt: int,
    chunk_tokens: int,
) -> None:
    """Average over the queries, then over each chunk's real tokens.

    Args:
        running_max: float32 [num_queries, num_prompt].
        out: float32 [ceil(num_prompt / chunk_tokens)].
    """
    check_positive(
        "chunk_reduce", num_queries=num_queries, num_prompt=num_prompt, chunk_tokens=chunk_tokens
    )
    num_chunks = -(-num_prompt // chunk_tokens)
    device.launch(
        CHUNK_REDUCE.source(),
        (-(-num_chunks // WARPS),),
        WARPS * 32,
        (running_max, out, np.int32(num_queries), np.int32(num_prompt), np.int32(chunk_tokens)),
    )
