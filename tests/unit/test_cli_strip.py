"""The strip of kept parts: shares by cell, and marks that never hide a kept byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skim.cli.strip import ASCII, BLOCKS, draw, kept_shares
from skim.spans import Span, kept_bytes, merge


def test_shares_follow_the_spans_cell_by_cell() -> None:
    spans = [Span(0, 10), Span(25, 30), Span(38, 42)]
    assert kept_shares(spans, 0, 50, 5) == [1.0, 0.0, 0.5, 0.2, 0.2]


def test_shares_count_from_the_start_of_the_range_shown() -> None:
    assert kept_shares([Span(100, 110)], 100, 120, 2) == [1.0, 0.0]


def test_range_smaller_than_the_strip_gets_one_cell_a_byte() -> None:
    assert kept_shares([Span(1, 2)], 0, 3, 80) == [0.0, 1.0, 0.0]


@given(
    st.lists(st.tuples(st.integers(0, 999), st.integers(1, 60)), max_size=12),
    st.integers(1, 90),
)
def test_shares_weighted_by_their_cells_add_up_to_the_kept_bytes(
    pairs: list[tuple[int, int]], cells: int
) -> None:
    size = 1000
    spans = merge(Span(begin, min(size, begin + length)) for begin, length in pairs)
    shares = kept_shares(spans, 0, size, cells)
    edges = [size * cell // cells for cell in range(cells + 1)]
    total = sum(s * (edges[i + 1] - edges[i]) for i, s in enumerate(shares))
    assert total == pytest.approx(kept_bytes(spans), abs=1e-6)


@pytest.mark.parametrize("plain", [True, False])
def test_strip_shows_the_least_share_and_only_then_leaves_the_empty_mark(plain: bool) -> None:
    marks = ASCII if plain else BLOCKS
    text = draw([0.0, 1e-6, 1.0], plain=plain).plain
    assert text == marks[0] + marks[1] + marks[-1]


def test_plain_strip_has_neither_colour_nor_anything_beyond_ascii() -> None:
    text = draw([0.0, 0.5, 1.0], plain=True)
    assert text.plain.isascii()
    assert text.spans == []
