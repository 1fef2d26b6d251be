"""Selection by coverage: what the panel measures, how near the greedy is to the smallest set."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from drafter_svc.selection import Outcome, Selection, SelectionConfig, chunk_sizes, select
from skim.errors import InvalidRequest

CHUNK = 4


def choose(panel, *, forced=(), scores=None, **config) -> Selection:
    rows = None if panel is None else np.asarray(panel, np.float32)
    width = len(scores) if rows is None else rows.shape[1]
    mask = np.zeros(width, np.bool_)
    mask[list(forced)] = True
    values = np.zeros(width) if scores is None else scores
    bare = {
        "head_chunks": 0,
        "tail_chunks": 0,
        "neighbour_chunks": 0,
        "min_keep": 0.001,
        "max_keep": 1.0,
    }
    return select(
        np.asarray(values, np.float32),
        rows,
        mask,
        chunk_sizes(CHUNK * width, CHUNK),
        SelectionConfig(**{**bare, **config}),
    )


def indices(selection: Selection) -> list[int]:
    return np.flatnonzero(selection.kept).tolist()


def covers(panel: np.ndarray, chosen: tuple[int, ...], asked: float) -> bool:
    return bool((panel[:, list(chosen)].sum(axis=1) >= asked - 1e-6).all())


def smallest_cover(panel: np.ndarray, asked: float) -> int:
    width = panel.shape[1]
    return next(
        size
        for size in range(width + 1)
        if any(covers(panel, chosen, asked) for chosen in combinations(range(width), size))
    )


def random_panel(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Peaked rows, as attention is: a few chunks hold most of the mass."""
    return rng.dirichlet(np.full(width, 0.4), size=rows).astype(np.float32)


def test_heaviest_chunks_are_kept_until_the_asked_coverage_is_reached():
    selection = choose([[0.1, 0.4, 0.15, 0.3, 0.05]], coverage=0.7)
    assert (indices(selection), selection.outcome) == ([1, 3], Outcome.COVERAGE)
    assert selection.coverage == pytest.approx(0.7, abs=1e-6)


def test_row_that_lacks_most_decides():
    # The first pick covers row 0 to 0.8; row 1 then lacks more and gets the second.
    panel = [[0.8, 0.1, 0.1, 0.0], [0.0, 0.1, 0.2, 0.7]]
    selection = choose(panel, coverage=0.65)
    assert indices(selection) == [0, 3]
    assert selection.coverage == pytest.approx(0.7, abs=1e-6)


def test_equal_masses_go_to_the_lower_index():
    assert indices(choose([[0.25, 0.25, 0.25, 0.25]], coverage=0.5)) == [0, 1]


def test_coverage_is_that_of_the_worst_row_also_by_ratio():
    panel = [[0.6, 0.4, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]
    selection = choose(panel, scores=[9, 8, 0, 0], keep_ratio=0.5)
    assert indices(selection) == [0, 1]
    assert selection.coverage == pytest.approx(0.3, abs=1e-6)


def test_mass_in_forced_chunks_is_taken_out_and_the_rest_scaled():
    # 0.9 of the mass lies in the forced chunk; of the other 0.1 the kept chunk holds 3/4.
    selection = choose([[0.9, 0.075, 0.025]], forced=[0], scores=[0, 1, 0], keep_ratio=0.67)
    assert indices(selection) == [0, 1]
    assert selection.coverage == pytest.approx(0.75, abs=1e-6)


def test_row_with_nearly_all_its_mass_forced_is_left_out():
    panel = [[0.9995, 0.0, 0.0005], [0.5, 0.4, 0.1]]
    selection = choose(panel, forced=[0], scores=[0, 1, 0], keep_ratio=0.67)
    assert selection.coverage == pytest.approx(0.8, abs=1e-6)


def test_coverage_is_one_when_no_row_looks_outside_the_forced_chunks():
    selection = choose([[1.0, 0.0, 0.0]], forced=[0], coverage=0.9)
    assert (selection.coverage, selection.outcome) == (1.0, Outcome.COVERAGE)
    assert indices(selection) == [0]


def test_coverage_is_unset_without_a_panel():
    selection = choose(None, scores=[1, 2, 3], keep_ratio=0.4)
    assert (indices(selection), selection.coverage) == ([2], None)


def test_asking_for_coverage_without_a_panel_is_refused():
    with pytest.raises(InvalidRequest, match="selection.coverage"):
        choose(None, scores=[1, 2, 3], coverage=0.5)


def test_unreached_coverage_keeps_what_max_keep_as_ratio_keeps():
    panel = [[0.25, 0.25, 0.25, 0.25]]
    low = choose(panel, scores=[0, 1, 3, 2], coverage=0.9, max_keep=0.5)
    assert (indices(low), low.outcome) == ([2, 3], Outcome.LOW_COVERAGE)
    assert low.coverage == pytest.approx(0.5)
    assert indices(choose(panel, scores=[0, 1, 3, 2], keep_ratio=0.5)) == [2, 3]


def test_forced_chunks_over_max_keep_are_low_coverage():
    selection = choose([[0.4, 0.4, 0.2]], forced=[0, 1], coverage=0.9, max_keep=0.5)
    assert (indices(selection), selection.outcome) == ([0, 1], Outcome.LOW_COVERAGE)
    assert selection.coverage == 0.0


def test_min_keep_is_filled_by_score_after_the_coverage_is_reached():
    panel = [[0.95, 0.01, 0.02, 0.02]]
    selection = choose(panel, scores=[0, 3, 1, 2], coverage=0.9, min_keep=0.6)
    assert (indices(selection), selection.outcome) == ([0, 1, 3], Outcome.COVERAGE)


def test_min_keep_does_not_pass_max_keep():
    # min_keep asks for 2.2 chunks, max_keep holds 2.
    panel = [[0.95, 0.01, 0.02, 0.02]]
    selection = choose(panel, scores=[0, 3, 1, 2], coverage=0.9, min_keep=0.55, max_keep=0.55)
    assert indices(selection) == [0, 1]


def test_pick_brings_neighbours_and_their_mass_counts():
    panel = [[0.1, 0.2, 0.4, 0.1, 0.2]]
    selection = choose(panel, coverage=0.7, neighbour_chunks=1)
    assert indices(selection) == [1, 2, 3]


def test_coverage_reached_by_a_pick_stands_when_its_neighbours_find_no_room():
    selection = choose([[0.1, 0.8, 0.1, 0.0]], coverage=0.8, max_keep=0.25, neighbour_chunks=1)
    assert (indices(selection), selection.outcome) == ([1], Outcome.COVERAGE)


def test_full_coverage_is_reachable():
    panel = random_panel(np.random.default_rng(5), 3, 40)
    selection = choose(panel, coverage=1.0)
    assert selection.outcome is Outcome.COVERAGE
    assert selection.coverage == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("asked", [0.3, 0.6, 0.9, 0.99])
def test_single_row_gets_the_smallest_set(asked):
    rng = np.random.default_rng(11)
    for _ in range(40):
        panel = random_panel(rng, 1, 9)
        assert choose(panel, coverage=asked).kept.sum() == smallest_cover(panel, asked)


def test_several_rows_get_a_set_near_the_smallest():
    # Set cover: the greedy may miss the optimum. On these 200 seeded panels it needs 0.09 chunks
    # more on average, and never more than one.
    rng = np.random.default_rng(12)
    excess = []
    for _ in range(200):
        panel = random_panel(rng, int(rng.integers(2, 6)), 9)
        asked = float(rng.choice([0.5, 0.8, 0.9]))
        selection = choose(panel, coverage=asked)
        assert covers(panel, tuple(indices(selection)), asked)
        excess.append(int(selection.kept.sum()) - smallest_cover(panel, asked))
    assert max(excess) <= 1 and np.mean(excess) <= 0.1
