"""Which blocks of keys each tile of queries reads: lists, counts, and which rows a bound cut.

Runs after `kernels.ops.block_score`; `kernels.ops.sparse_attention` reads the lists. Nothing
crosses to the host.
"""

from __future__ import annotations

import struct

import numpy as np

from kernels.device import Device
from kernels.ops.checks import check, check_aligned, check_positive
from kernels.reference import BlockRule
from kernels.specialisation import LEAST_SHARED_BYTES, Family

BLOCK_SELECT = Family("block_select.cu", "block_select")

WARPS = 4  # rows of a block of threads
MAX_BLOCKS = LEAST_SHARED_BYTES // (4 * WARPS)  # a row is words in shared memory


def block_select(
    device: Device,
    *,
    mass: int,
    indices: int,
    counts: int,
    cut: int,
    num_heads: int,
    num_blocks: int,
    rule: BlockRule,
) -> None:
    """Choose the blocks of every tile of every query head, in one launch.

    Args:
        mass: float32 [num_heads, num_tiles, num_blocks], not negative; entries J > I are not read.
        indices: int32 [num_heads, num_tiles, num_blocks]; `counts` of a row are written, ascending.
        counts: int32 [num_heads, num_tiles].
        cut: uint8 [num_heads, num_tiles], 1 where `max_density` dropped a block, else 0.
        rule: `window_blocks` at least 1, so that the diagonal block is in each list.
    """
    name = "block_select"
    check_positive(name, num_heads=num_heads, num_blocks=num_blocks)
    check(num_blocks <= MAX_BLOCKS, name, "num_blocks", num_blocks, f"at most {MAX_BLOCKS}")
    check(rule.window_blocks >= 1, name, "window_blocks", rule.window_blocks, "at least 1")
    check_aligned(name, mass=mass, indices=indices, counts=counts)
    num_rows = num_heads * num_blocks
    device.launch(
        BLOCK_SELECT.source(),
        (-(-num_rows // WARPS),),
        WARPS * 32,
        (
            mass,
            indices,
            counts,
            cut,
            np.int32(num_rows),
            np.int32(num_blocks),
            np.int32(rule.sink_blocks),
            np.int32(rule.window_blocks),
            np.int32(rule.last_full_blocks),
            np.float32(rule.alpha),
            struct.unpack("<q", struct.pack("<d", rule.max_density))[0],
        ),
        shared_bytes=4 * WARPS * num_blocks,
    )
