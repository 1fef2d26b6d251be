"""Selection by keep_ratio: forced chunks, budget, order, and the way back to bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_svc.selection import (
    Outcome,
    Selection,
    SelectionConfig,
    chunk_sizes,
    forced_chunks,
    kept_spans,
    select,
    token_ranges,
)
from skim.errors import EngineFault
from skim.spans import Span, check_canonical

BARE = {"head_chunks": 0, "tail_chunks": 0, "neighbour_chunks": 0}


def choose(scores, num_tokens, *, forced=(), chunk_tokens=4, panel=None, **config) -> Selection:
    sizes = chunk_sizes(num_tokens, chunk_tokens)
    settings_ = SelectionConfig(**{**BARE, **config})
    mask = forced_chunks(sizes, settings_, np.empty((0, 2), np.int64))
    mask[list(forced)] = True
    return select(np.asarray(scores, np.float32), panel, mask, sizes, settings_)


def indices(selection: Selection) -> list[int]:
    return np.flatnonzero(selection.kept).tolist()


def test_highest_scores_are_kept_until_the_budget_is_full():
    selection = choose([1, 5, 3, 4, 2], 20, keep_ratio=0.4)
    assert indices(selection) == [1, 3]
    assert (selection.kept_tokens, selection.outcome) == (8, Outcome.KEEP_RATIO)


def test_equal_scores_go_to_the_lower_index():
    assert indices(choose([2, 7, 7, 7, 2], 20, keep_ratio=0.4)) == [1, 2]


def test_budget_that_is_whole_in_exact_arithmetic_is_not_lost_to_rounding():
    assert 0.29 * 100 < 29
    assert choose(np.arange(100), 100, chunk_tokens=1, keep_ratio=0.29).kept_tokens == 29


def test_short_last_chunk_counts_its_real_tokens():
    # 9 tokens in chunks of 4, 4 and 1; a budget of 5 holds one whole chunk and the short one.
    selection = choose([1, 2, 3], 9, keep_ratio=5 / 9)
    assert (indices(selection), selection.kept_tokens) == ([1, 2], 5)


def test_head_and_tail_chunks_are_kept_and_count_in_the_budget():
    selection = choose([0, 9, 8, 7, 0, 0], 24, keep_ratio=4 / 6, head_chunks=1, tail_chunks=2)
    assert indices(selection) == [0, 1, 4, 5]


def test_forced_chunks_over_the_budget_are_kept_and_nothing_else():
    selection = choose([9, 1, 1, 9, 9], 20, forced=[1, 2], keep_ratio=0.2)
    assert (indices(selection), selection.outcome) == ([1, 2], Outcome.FORCED_ONLY)


def test_forced_chunks_that_fill_the_budget_exactly_are_no_excess():
    selection = choose([9, 1, 1, 9, 9], 20, forced=[1, 2], keep_ratio=0.4)
    assert (indices(selection), selection.outcome) == ([1, 2], Outcome.KEEP_RATIO)


def test_best_chunk_is_kept_when_the_budget_holds_none():
    selection = choose([1, 2, 3, 0], 16, keep_ratio=0.05)
    assert (indices(selection), selection.outcome) == ([2], Outcome.FORCED_ONLY)


def test_neighbours_come_with_their_pick_nearest_first_inside_the_budget():
    scores = [0, 0, 0, 9, 0, 0, 8, 0]
    assert indices(choose(scores, 32, keep_ratio=3 / 8, neighbour_chunks=2)) == [2, 3, 4]
    assert indices(choose(scores, 32, keep_ratio=4 / 8, neighbour_chunks=2)) == [1, 2, 3, 4]


def test_neighbour_that_is_picked_later_brings_its_own():
    scores = [0, 0, 9, 8, 0, 1]
    assert indices(choose(scores, 24, keep_ratio=4 / 6, neighbour_chunks=1)) == [1, 2, 3, 4]


def test_neighbour_that_is_forced_does_not_count_twice():
    selection = choose([0, 9, 8, 0, 1], 20, forced=[0], keep_ratio=3 / 5, neighbour_chunks=1)
    assert indices(selection) == [0, 1, 2]


def test_ratio_of_one_keeps_everything_as_one_span():
    prompt = b"abcdefghij"
    selection = choose([3, 1, 2], 10, keep_ratio=1.0)
    assert selection.kept.all()
    ends = np.arange(1, 11, dtype=np.int32)
    assert kept_spans(selection.kept, ends, 4, prompt) == [Span(0, 10)]


def test_prompt_of_one_token_is_kept():
    selection = choose([0.5], 1, keep_ratio=0.1, head_chunks=1, tail_chunks=4)
    assert (indices(selection), selection.kept_tokens) == ([0], 1)
    assert kept_spans(selection.kept, np.array([3], np.int32), 4, b"abc") == [Span(0, 3)]


def test_protected_tokens_force_every_chunk_they_touch():
    sizes = chunk_sizes(20, 4)
    ranges = np.array([[3, 5], [12, 12], [19, 20]])
    forced = forced_chunks(sizes, SelectionConfig(**BARE), ranges)
    assert np.flatnonzero(forced).tolist() == [0, 1, 4]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_a_fault_of_ours(broken):
    with pytest.raises(EngineFault, match="not finite"):
        choose([1, broken, 2], 12)
    panel = np.array([[0.5, broken, 0.5]], np.float32)
    with pytest.raises(EngineFault, match="not finite"):
        choose([1, 2, 3], 12, panel=panel)


def test_token_range_ignores_tokens_without_bytes_at_its_ends():
    # Token 0 has no bytes (a beginning-of-sequence mark), token 2 neither.
    ends = np.array([0, 3, 3, 5, 9], np.int32)
    assert token_ranges(ends, [Span(0, 1), Span(2, 4), Span(3, 5)]).tolist() == [
        [1, 2],
        [1, 4],
        [3, 4],
    ]


def test_kept_chunk_without_bytes_gives_no_span():
    # The empty token lies inside a code point: rounding it outward would keep the code point.
    ends = np.array([1, 1, 2, 3], np.int32)
    assert kept_spans(np.array([False, True, False, False]), ends, 1, "é!".encode()) == []


def test_spans_round_outward_to_code_points_and_merge_when_they_touch():
    # One token a byte; chunks of one token: each kept chunk is half of a two-byte letter.
    prompt = "éèx".encode()
    ends = np.arange(1, 6, dtype=np.int32)
    kept = np.array([True, False, False, True, False])
    assert kept_spans(kept, ends, 1, prompt) == [Span(0, 4)]


@st.composite
def prompts(draw):
    """A prompt, token ends that may cut code points and repeat, and a chunk size."""
    prompt = draw(st.text(alphabet="ab é漢😀", min_size=1, max_size=60)).encode()
    cuts = draw(st.lists(st.integers(0, len(prompt)), max_size=80))
    ends = np.array(sorted([*cuts, len(prompt)]), np.int32)
    return prompt, ends, draw(st.integers(1, 7))


@st.composite
def cases(draw):
    prompt, ends, chunk_tokens = draw(prompts())
    sizes = chunk_sizes(len(ends), chunk_tokens)
    # Few distinct values, so that ties are the rule.
    scores = draw(st.lists(st.integers(-2, 2), min_size=sizes.size, max_size=sizes.size))
    config = SelectionConfig(
        keep_ratio=draw(st.floats(0.001, 1.0)),
        head_chunks=draw(st.integers(0, 2)),
        tail_chunks=draw(st.integers(0, 2)),
        neighbour_chunks=draw(st.integers(0, 2)),
    )
    begin = draw(st.integers(0, len(prompt) - 1))
    protected = Span(begin, draw(st.integers(begin + 1, len(prompt))))
    forced = forced_chunks(sizes, config, token_ranges(ends, [protected]))
    return (
        prompt,
        ends,
        chunk_tokens,
        sizes,
        np.array(scores, np.float32),
        config,
        protected,
        forced,
    )


@settings(max_examples=300, deadline=None)
@given(cases())
def test_spans_are_always_canonical_and_hold_the_protected_range(case):
    prompt, ends, chunk_tokens, sizes, scores, config, protected, forced = case
    selection = select(scores, None, forced, sizes, config)
    spans = kept_spans(selection.kept, ends, chunk_tokens, prompt)
    check_canonical(spans, prompt)
    assert any(span.begin <= protected.begin and protected.end <= span.end for span in spans)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_budget_is_never_passed_unless_the_forced_chunks_pass_it(case):
    *_, sizes, scores, config, _, forced = case
    selection = select(scores, None, forced, sizes, config)
    assert selection.kept[forced].all()
    assert selection.kept_tokens == sizes[selection.kept].sum()
    if selection.outcome is Outcome.FORCED_ONLY:
        assert sizes[forced].sum() > config.keep_ratio * sizes.sum()
        assert (selection.kept == forced).all()
    else:
        assert selection.kept_tokens <= config.keep_ratio * sizes.sum() + 1e-6
        left_out = sizes[~selection.kept]
        if left_out.size:
            assert selection.kept_tokens + left_out.max() > config.keep_ratio * sizes.sum() - 1e-6


@settings(max_examples=300, deadline=None)
@given(cases(), st.floats(0.001, 1.0))
def test_larger_ratio_keeps_a_superset(case, other):
    *_, sizes, scores, config, _, forced = case
    low, high = sorted((config.keep_ratio, other))
    fields = {name: getattr(config, name) for name in ("head_chunks", "tail_chunks")}
    fields["neighbour_chunks"] = config.neighbour_chunks
    small = select(scores, None, forced, sizes, SelectionConfig(keep_ratio=low, **fields))
    large = select(scores, None, forced, sizes, SelectionConfig(keep_ratio=high, **fields))
    assert (small.kept <= large.kept).all()
