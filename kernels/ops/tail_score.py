"""How strongly the asking queries look at each prompt token: one layer, three launches.

Adds to what `kernels.ops.chunk_reduce` and the coverage panel are read from after the last layer.
"""

from __future__ import annotations

import math

import numpy as np

from kernels.device import Device
from kernels.ops.checks import ROW_MULTIPLE, check, check_aligned, check_multiple, check_positive
from kernels.specialisation import Family

TAIL_LOGITS = Family("tail_score.cu", "tail_logits", HEAD_DIM=(64, 128, 256))
TAIL_COMBINE = Family("tail_score.cu", "tail_combine")
POOLS = (13, 0)  # the default width, known to the compiler; any other is read at run time
TAIL_POOL = Family("tail_score.cu", "tail_pool", POOL=POOLS)

MAX_QUERIES = 72  # 8 of the question, and 64 of a look-ahead
MAX_POOL = 1017  # a tile then scores 8 of its 1,024 keys: right, and slow
MAX_HEADS = 256
# As in the source:
SLICE_KEYS = 512
COLUMNS = 24  # query heads x queries of one reading of the keys
TILE_KEYS = 1024
MAX_PROMPT = 65_535 * SLICE_KEYS  # a grid has at most 65,535 blocks in y


def _slices(num_prompt: int) -> int:
    return -(-num_prompt // SLICE_KEYS)


def _logits_stride(num_prompt: int) -> int:
    """Floats from one row of logits to the next; whole sectors of memory."""
    return -(-num_prompt // 8) * 8


def scratch_bytes(*, num_heads: int, num_queries: int, num_prompt: int) -> int:
    """Bytes of `scratch`: logits, partial sums a slice, and the softmax of each row.

    At 131,072 tokens, 16 heads and 9 queries 72.3 MiB. Contents are undefined before and after.
    """
    rows = num_heads * num_queries
    return rows * (4 * _logits_stride(num_prompt) + 8 * _slices(num_prompt) + 8)


def span_of(chunk_tokens: int, pool_kernel: int) -> int:
    """Keys of one block of threads of `tail_pool`: whole chunks and a multiple of 4.

    As many as one tile scores, which lacks the neighbours of the keys at its ends; a chunk too long
    for that is scored in several tiles, one after another.
    """
    scored = TILE_KEYS - 2 * (-(-(pool_kernel // 2) // 4) * 4)
    step = math.lcm(chunk_tokens, 4)
    return step * max(1, scored // step)


def tail_score(
    device: Device,
    *,
    q: int,
    q_row_stride: int,
    q_rows: int,
    k: int,
    k_row_stride: int,
    positions: int,
    running_max: int,
    panel: int,
    scratch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_queries: int,
    num_prompt: int,
    chunk_tokens: int,
    pool_kernel: int,
    scale: float,
) -> None:
    """Score one layer. The caller zeroes `running_max` and `panel` before the first.

    Args:
        q: bf16, rotated; head h of a row at column h * head_dim, rows `q_row_stride` apart.
        q_rows: int32 [num_queries], row of q of each query (`positions`, where q is all rows).
        k: bf16, rotated; key t in row t, KV head h at column h * head_dim.
        positions: int32 [num_queries], not negative; a query at p sees keys 0..p, and all of them
            at or past num_prompt.
        running_max: float32 [num_queries, num_prompt], raised to the pooled rows' maximum.
        panel: float32 [num_queries, num_chunks] of the layer's group; chunk sums of the mean over
            heads of the unpooled rows are added.
        scratch: `scratch_bytes`, 16-byte aligned.
        pool_kernel: odd.
        scale: of the logits.
    """
    name = "tail_score"
    check_positive(name, num_queries=num_queries, num_prompt=num_prompt, chunk_tokens=chunk_tokens)
    check_positive(name, num_heads=num_heads, num_kv_heads=num_kv_heads)
    check(num_heads % num_kv_heads == 0, name, "num_heads", num_heads, "whole groups of KV heads")
    check(num_heads <= MAX_HEADS, name, "num_heads", num_heads, f"at most {MAX_HEADS}")
    check(num_queries <= MAX_QUERIES, name, "num_queries", num_queries, f"at most {MAX_QUERIES}")
    check(num_prompt <= MAX_PROMPT, name, "num_prompt", num_prompt, f"at most {MAX_PROMPT}")
    odd = pool_kernel % 2 == 1 and 0 < pool_kernel <= MAX_POOL
    check(odd, name, "pool_kernel", pool_kernel, f"odd, at most {MAX_POOL}")
    check_multiple(name, ROW_MULTIPLE, q_row_stride=q_row_stride, k_row_stride=k_row_stride)
    check_aligned(name, q=q, k=k, running_max=running_max, scratch=scratch)

    chunk_tokens = min(chunk_tokens, num_prompt)  # one chunk, whatever more was asked
    rows, slices, stride = num_heads * num_queries, _slices(num_prompt), _logits_stride(num_prompt)
    partials = scratch + 4 * rows * stride
    norms = partials + 8 * rows * slices
    group = num_heads // num_kv_heads
    column_groups = -(-group * num_queries // COLUMNS)
    device.launch(
        TAIL_LOGITS.source(HEAD_DIM=head_dim),
        (num_kv_heads * column_groups, slices),
        128,
        (
            q,
            k,
            q_rows,
            positions,
            scratch,
            partials,
            np.int32(q_row_stride),
            np.int32(k_row_stride),
            np.int32(num_prompt),
            np.int32(stride),
            np.int32(num_queries),
            np.int32(group),
            np.int32(column_groups),
            np.float32(scale * math.log2(math.e)),
        ),
    )
    device.launch(TAIL_COMBINE.source(), (rows,), 32, (partials, norms, np.int32(slices)))
    span = span_of(chunk_tokens, pool_kernel)
    device.launch(
        TAIL_POOL.source(POOL=pool_kernel if pool_kernel in POOLS else 0),
        (-(-num_prompt // span), num_queries),
        256,
        (
            scratch,
            norms,
            running_max,
            panel,
            np.int32(num_prompt),
            np.int32(stride),
            np.int32(num_heads),
            np.int32(num_queries),
            np.int32(chunk_tokens),
            np.int32(-(-num_prompt // chunk_tokens)),
            np.int32(span),
            np.int32(pool_kernel),
        ),
    )
