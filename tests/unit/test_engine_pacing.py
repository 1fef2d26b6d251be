"""How the next prefill chunk's size follows from how deaf the last one was."""

from __future__ import annotations

from target_svc.llama.pacing import SMALLEST, ChunkPacer


def test_slow_chunk_halves_the_next_down_to_the_smallest() -> None:
    pacer = ChunkPacer(2048, 0.8)
    sizes = []
    for _ in range(5):
        pacer.took(pacer.tokens, 0.81)
        sizes.append(pacer.tokens)
    assert sizes == [1024, 512, 256, SMALLEST, SMALLEST]


def test_fast_chunk_doubles_the_next_up_to_the_largest() -> None:
    pacer = ChunkPacer(1024, 0.8)
    pacer.took(1024, 0.9)
    pacer.took(512, 0.19)
    pacer.took(1024, 0.01)
    assert pacer.tokens == 1024


def test_chunk_between_the_two_bounds_changes_nothing() -> None:
    pacer = ChunkPacer(2048, 0.8)
    pacer.took(2048, 0.5)
    assert pacer.tokens == 2048


def test_short_last_chunk_says_nothing_about_a_full_one() -> None:
    pacer = ChunkPacer(2048, 0.8)
    pacer.took(2048, 0.9)
    pacer.took(10, 0.001)
    assert pacer.tokens == 1024


def test_pacing_switched_off_keeps_the_largest_chunk() -> None:
    pacer = ChunkPacer(2048, 0.0)
    pacer.took(2048, 30.0)
    assert pacer.tokens == 2048


def test_smallest_never_exceeds_a_small_batch() -> None:
    pacer = ChunkPacer(64, 0.8)
    pacer.took(64, 2.0)
    assert pacer.tokens == 64
