"""How many threads a block gets where the kernel takes any number."""

from __future__ import annotations

WARP = 32
MAX_THREADS = 256


def threads_for(num_items: int) -> int:
    """Whole warps, at most 256 threads, that walk `num_items` with as few idle ones as can be."""
    passes = -(-num_items // MAX_THREADS)
    return -(-num_items // (passes * WARP)) * WARP
