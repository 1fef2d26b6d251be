"""Properties of skim/spans.py over random text; the vectors pin single cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skim import spans
from skim.errors import SpansNotCanonical
from skim.spans import Span

# Letters, an accent that combines, two- to four-byte code points, a joiner: everything that cuts.
TEXT = st.text(alphabet="ab é\u0301東😀\u200d\n", max_size=40)


@st.composite
def prompts_with_ranges(draw: st.DrawFn) -> tuple[bytes, list[Span]]:
    prompt = draw(TEXT).encode()
    offsets = st.integers(0, len(prompt) + 3)
    pairs = draw(st.lists(st.tuples(offsets, offsets), max_size=8))
    return prompt, [Span(begin, end) for begin, end in pairs]


@st.composite
def prompts_with_token_ends(draw: st.DrawFn) -> tuple[bytes, list[int], list[Span]]:
    prompt, ranges = draw(prompts_with_ranges())
    cuts = draw(st.lists(st.integers(0, len(prompt)), max_size=20))
    ends = sorted([*cuts, len(prompt)]) if prompt else []
    return prompt, ends, spans.canonical(ranges, prompt)


def covered(ranges: list[Span]) -> set[int]:
    return {offset for begin, end in ranges for offset in range(begin, end)}


@given(prompts_with_ranges())
def test_canonical_output_passes_its_own_check(case: tuple[bytes, list[Span]]) -> None:
    prompt, ranges = case
    spans.check_canonical(spans.canonical(ranges, prompt), prompt)


@given(prompts_with_ranges())
def test_canonical_covers_each_touched_code_point_and_nothing_else(
    case: tuple[bytes, list[Span]],
) -> None:
    prompt, ranges = case
    wanted, touched, position = covered(ranges), set(), 0
    for character in prompt.decode():
        own = set(range(position, position + len(character.encode())))
        touched |= own if own & wanted else set()
        position += len(own)
    assert covered(spans.canonical(ranges, prompt)) == touched


@given(prompts_with_ranges())
def test_canonical_is_idempotent(case: tuple[bytes, list[Span]]) -> None:
    prompt, ranges = case
    once = spans.canonical(ranges, prompt)
    assert spans.canonical(once, prompt) == once


@given(prompts_with_ranges())
def test_decode_undoes_encode(case: tuple[bytes, list[Span]]) -> None:
    prompt, ranges = case
    kept = spans.canonical(ranges, prompt)
    assert spans.decode(*spans.encode(kept), prompt) == kept


@given(prompts_with_ranges())
def test_a_span_that_cuts_a_code_point_is_refused(case: tuple[bytes, list[Span]]) -> None:
    prompt, ranges = case
    for span in ranges:
        inside = 0 <= span.begin < span.end <= len(prompt)
        cuts = inside and not all(spans.is_boundary(prompt, edge) for edge in span)
        if cuts:
            with pytest.raises(SpansNotCanonical):
                spans.check_canonical([span], prompt)


@given(prompts_with_ranges())
def test_merged_spans_touched_again_are_refused(case: tuple[bytes, list[Span]]) -> None:
    prompt, ranges = case
    for span in spans.canonical(ranges, prompt):
        middle = next(
            (at for at in range(span.begin + 1, span.end) if spans.is_boundary(prompt, at)), None
        )
        if middle is not None:
            halves = [Span(span.begin, middle), Span(middle, span.end)]
            with pytest.raises(SpansNotCanonical):
                spans.check_canonical(halves, prompt)


@given(prompts_with_token_ends())
def test_kept_tokens_are_those_that_share_a_byte_with_a_span(
    case: tuple[bytes, list[int], list[Span]],
) -> None:
    _, ends, kept = case
    tokens = list(zip([0, *ends], ends, strict=False))
    bytes_kept = covered(kept)
    expected = {i for i, token in enumerate(tokens) if bytes_kept & set(range(*token))}
    ranges = spans.tokens_overlapping(ends, kept)
    found = {index for first, last in ranges for index in range(first, last)}
    without_bytes = {i for i, (start, end) in enumerate(tokens) if start == end}
    assert found - without_bytes == expected
    assert all(first in expected and last - 1 in expected for first, last in ranges)
    assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False))


def test_kept_bytes_counts_each_byte_once() -> None:
    assert spans.kept_bytes([Span(0, 4), Span(6, 7)]) == 5
