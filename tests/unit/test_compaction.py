"""Kept spans become ids and positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skim.errors import InvalidRequest
from skim.spans import Span, canonical
from target_svc.compaction import TokenisedPrompt, compact, kept_ranges

BOS = 7


def prompt_of(sizes: list[int], *, bos: bool = False) -> TokenisedPrompt:
    """A prompt whose token i has id 100 + i and the given size in bytes."""
    ids = np.arange(100, 100 + len(sizes), dtype=np.int32)
    ends = np.cumsum(sizes, dtype=np.int64)
    if bos:
        ids, ends = np.append(np.int32(BOS), ids), np.append(np.int64(0), ends)
    return TokenisedPrompt(ids, ends, leading=int(bos))


def test_kept_tokens_are_those_a_span_touches_and_the_last_one() -> None:
    kept = compact(prompt_of([4, 6, 5, 3, 2]), [Span(3, 5)], original=False)
    assert kept.ids.tolist() == [100, 101, 104]


def test_compacted_positions_are_contiguous_and_generation_follows_them() -> None:
    kept = compact(prompt_of([4, 6, 5, 3, 2]), [Span(10, 15)], original=False)
    assert kept.positions.tolist() == [0, 1] and kept.next_position == 2


def test_original_positions_are_the_prompt_s_and_generation_follows_the_whole_prompt() -> None:
    kept = compact(prompt_of([4, 6, 5, 3, 2]), [Span(10, 15)], original=True)
    assert kept.positions.tolist() == [2, 4] and kept.next_position == 5


def test_the_last_token_is_kept_once_when_a_span_holds_it_too() -> None:
    kept = compact(prompt_of([4, 6, 5]), [Span(10, 15)], original=False)
    assert kept.ids.tolist() == [102]


def test_no_spans_keep_the_last_token_alone() -> None:
    assert compact(prompt_of([4, 6, 5]), [], original=False).ids.tolist() == [102]


def test_bos_is_kept_and_counts_as_a_position() -> None:
    kept = compact(prompt_of([4, 6, 5, 3], bos=True), [Span(4, 10)], original=True)
    assert kept.ids.tolist() == [BOS, 101, 103]
    assert kept.positions.tolist() == [0, 2, 4] and kept.next_position == 5


def test_whole_prompt_keeps_everything_with_bos() -> None:
    prompt = prompt_of([4, 6, 5, 3], bos=True)
    for original in (False, True):
        kept = compact(prompt, [Span(0, 18)], original=original)
        assert kept.ids.tolist() == prompt.ids.tolist()
        assert kept.positions.tolist() == [0, 1, 2, 3, 4] and kept.next_position == 5


def test_result_arrays_are_contiguous_int32() -> None:
    kept = compact(prompt_of([1] * 9), [Span(2, 4)], original=True)
    for array in (kept.ids, kept.positions):
        assert array.dtype == np.int32 and array.flags.c_contiguous


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        compact(prompt_of([]), [], original=False)


@given(st.data())
def test_any_spans_give_an_ascending_subset_that_holds_each_touched_token(data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=30))
    text = b"x" * sum(sizes)
    edge = st.integers(0, len(text))
    spans = canonical(
        [Span(*pair) for pair in data.draw(st.lists(st.tuples(edge, edge), max_size=5))], text
    )
    prompt = prompt_of(sizes, bos=data.draw(st.booleans()))
    kept = compact(prompt, spans, original=True)
    starts = [0, *prompt.ends.tolist()[:-1]]
    touched = {
        i
        for i, (start, end) in enumerate(zip(starts, prompt.ends.tolist(), strict=True))
        if any(start < span.end and span.begin < end for span in spans)
    }
    expected = touched | set(range(prompt.leading)) | {prompt.num_tokens - 1}
    assert kept.positions.tolist() == sorted(expected)
    assert kept.ids.tolist() == prompt.ids[sorted(expected)].tolist()
    ranges = kept_ranges(prompt, spans)
    assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False))
