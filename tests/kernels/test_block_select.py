"""Selection of blocks: exact lists on masses written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.reference import BlockRule, block_select, select_row

PLAIN = BlockRule(alpha=0.1, sink_blocks=0, window_blocks=1, last_full_blocks=0, max_density=1.0)


def test_a_block_is_kept_from_alpha_times_the_largest_mass_on() -> None:
    mass = np.array([0.099, 0.1, 1.0, 0.05, 0.0])
    assert select_row(mass, 4, 9, PLAIN)[0].tolist() == [1, 2, 4]


def test_the_threshold_is_of_the_largest_mass_and_not_of_the_mean() -> None:
    mass = np.array([1.0, 0.05, 0.05, 0.05, 0.05])  # the mean is 0.24, a tenth of it 0.024
    assert select_row(mass, 4, 9, PLAIN)[0].tolist() == [0, 4]


def test_sink_and_window_are_kept_whatever_their_mass() -> None:
    rule = BlockRule(alpha=0.5, sink_blocks=2, window_blocks=3, last_full_blocks=0, max_density=1.0)
    mass = np.zeros(12)
    mass[5] = 1.0
    assert select_row(mass, 10, 20, rule)[0].tolist() == [0, 1, 5, 8, 9, 10]


def test_no_block_past_the_diagonal_is_kept_however_large_its_mass() -> None:
    mass = np.array([1.0, 1.0, 1.0, 100.0, 100.0])
    assert select_row(mass, 2, 5, PLAIN)[0].tolist() == [0, 1, 2]


def test_the_last_tiles_see_every_block() -> None:
    rule = BlockRule(last_full_blocks=2, max_density=0.01)
    mass = np.zeros((1, 40, 40))
    lists = block_select(mass + np.eye(40), rule)
    assert lists.row(0, 39).tolist() == list(range(40))
    assert lists.row(0, 38).tolist() == list(range(39))
    assert lists.counts[0, 37] == 6
    assert not lists.cut[0, 38:].any()


def test_max_density_keeps_forced_blocks_first_then_the_largest_mass() -> None:
    rule = BlockRule(
        alpha=0.0, sink_blocks=2, window_blocks=4, last_full_blocks=0, max_density=0.25
    )
    mass = np.ones(40)
    mass[[7, 20]] = 5.0, 9.0
    blocks, cut = select_row(mass, 39, 50, rule)  # the bound is ceil(0.25 x 40) = 10
    assert blocks.tolist() == [0, 1, 2, 3, 7, 20, 36, 37, 38, 39]
    assert cut


def test_max_density_breaks_ties_to_the_lower_index() -> None:
    rule = BlockRule(
        alpha=0.0, sink_blocks=0, window_blocks=1, last_full_blocks=0, max_density=0.25
    )
    mass = np.ones(40)
    assert select_row(mass, 39, 50, rule)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 39]


def test_a_row_at_its_bound_is_not_called_cut() -> None:
    rule = BlockRule(
        alpha=0.5, sink_blocks=0, window_blocks=1, last_full_blocks=0, max_density=0.25
    )
    mass = np.zeros(32)
    mass[:7] = 1.0
    assert select_row(mass, 31, 50, rule)[1] is False
    mass[7] = 1.0
    blocks, cut = select_row(mass, 31, 50, rule)
    assert cut and blocks.tolist() == [0, 1, 2, 3, 4, 5, 6, 31]


def test_the_bound_never_goes_below_eight_blocks_nor_drops_a_forced_one() -> None:
    assert BlockRule(max_density=0.25).bound(3) == 8
    assert BlockRule(max_density=0.07).bound(299) == 21  # 0.07 x 300 is over 21 in binary
    wide = BlockRule(
        alpha=0.0, sink_blocks=6, window_blocks=6, last_full_blocks=0, max_density=0.01
    )
    blocks, cut = select_row(np.ones(40), 39, 50, wide)
    assert blocks.tolist() == [0, 1, 2, 3, 4, 5, 34, 35, 36, 37, 38, 39]
    assert cut


@pytest.mark.parametrize("num_tiles", [64, 200])
def test_max_density_bounds_the_work_on_flat_masses(num_tiles: int) -> None:
    rule = BlockRule()
    lists = block_select(np.ones((1, num_tiles, num_tiles)), rule)
    rows = np.arange(num_tiles - 2)
    assert (lists.counts[0, :-2] == np.minimum(rows + 1, [rule.bound(r) for r in rows])).all()
    assert lists.density < 0.25 + 8 / num_tiles
    assert lists.cut[0, 8:-2].all() and not lists.cut[0, :8].any()


def test_alpha_zero_without_a_bound_keeps_every_causal_block() -> None:
    mass = np.random.default_rng(22).random((2, 20, 20))
    lists = block_select(mass, BlockRule(alpha=0.0, last_full_blocks=0, max_density=1.0))
    assert lists.density == 1.0
    assert all(lists.row(h, t).tolist() == list(range(t + 1)) for h, t in np.ndindex(2, 20))
