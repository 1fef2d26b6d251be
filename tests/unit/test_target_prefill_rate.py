"""The predicted seconds of a full prefill."""

from __future__ import annotations

import pytest

from target_svc.prefill_rate import ChunkTimer, PrefillRate

A_S, B_S = 2e-4, 3e-8  # a machine whose token at position x takes A_S + B_S x


def cost_s(begin: int, end: int) -> float:
    return A_S * (end - begin) + B_S * (end**2 - begin**2) / 2


def measured(lengths: list[int], chunk: int = 2048) -> PrefillRate:
    rate = PrefillRate()
    for length in lengths:
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            rate.add(begin, end, cost_s(begin, end))
    return rate


def test_nothing_measured_predicts_nothing() -> None:
    assert PrefillRate().prefill_s(1000) == 0.0 and PrefillRate().tokens_per_s(1000) == 0.0


def test_one_short_prefill_predicts_its_own_length() -> None:
    rate = measured([256])
    assert rate.prefill_s(256) == pytest.approx(cost_s(0, 256))


def test_growth_with_position_is_found_from_three_short_lengths() -> None:
    # Exact data on a line: only the octave means' rounding is left.
    rate = measured([256, 1024, 4096])
    assert rate.prefill_s(32_768) == pytest.approx(cost_s(0, 32_768), rel=0.02)


def test_many_short_prompts_do_not_outvote_the_long_one() -> None:
    rate = measured([256, 1024, 16_384] + [256] * 2000)
    assert rate.prefill_s(16_384) == pytest.approx(cost_s(0, 16_384), rel=0.02)


def test_the_estimate_follows_a_machine_that_became_twice_as_slow() -> None:
    rate = measured([256, 1024, 4096])
    for _ in range(20):
        for begin, end in ((0, 256), (0, 1024), (0, 2048), (2048, 4096)):
            rate.add(begin, end, 2 * cost_s(begin, end))
    assert rate.prefill_s(4096) == pytest.approx(2 * cost_s(0, 4096), rel=0.05)


def test_rates_that_fall_with_length_never_predict_negative_seconds() -> None:
    rate = PrefillRate()
    rate.add(0, 128, 1.0)
    rate.add(0, 4096, 2.0)
    assert 0.0 < rate.prefill_s(10) < rate.prefill_s(100_000)


def test_growth_steeper_than_a_line_through_zero_is_bounded_below() -> None:
    rate = PrefillRate()
    rate.add(0, 1024, 0.01)
    rate.add(15_000, 16_000, 10.0)
    assert all(rate.prefill_s(n) > 0.0 for n in (1, 100, 10_000))


def test_chunks_too_short_or_without_time_are_ignored() -> None:
    rate = PrefillRate()
    rate.add(5, 5, 1.0)
    rate.add(0, 127, 1.0)
    rate.add(0, 500, 0.0)
    assert rate.prefill_s(5) == 0.0


def timer_over(companies: list[int | None], *, chunk: int = 1000) -> PrefillRate:
    """Time chunks of 1 s each, under the given company at each look."""
    rate, seen, now_s = PrefillRate(), iter(companies), iter(range(100))
    timer = ChunkTimer(rate, lambda: next(seen), clock=lambda: float(next(now_s)))
    for number in range(1, len(companies)):
        timer.at(number * chunk)
    return rate


def test_the_wait_before_the_first_chunk_is_not_part_of_it() -> None:
    rate, now_s = PrefillRate(), iter([0.0, 50.0, 51.0])
    timer = ChunkTimer(rate, lambda: 0, clock=lambda: next(now_s))
    timer.at(0)
    timer.at(1000)
    assert rate.prefill_s(1000) == pytest.approx(1.0)


def test_short_chunks_are_learnt_together() -> None:
    assert timer_over([4, 4, 4], chunk=64).prefill_s(128) == pytest.approx(2.0)


def test_a_chunk_that_ran_alone_is_learnt() -> None:
    assert timer_over([4, 4]).prefill_s(1000) == pytest.approx(1.0)


def test_a_chunk_beside_others_is_not_learnt() -> None:
    assert timer_over([None, None]).prefill_s(1000) == 0.0


def test_a_chunk_during_which_another_came_and_went_is_not_learnt() -> None:
    assert timer_over([4, 6]).prefill_s(1000) == 0.0
