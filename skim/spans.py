"""Spans: half-open byte ranges of a prompt, their canonical form, and the mapping to tokens.

First stop of the reading order. The drafter produces spans, the wire carries them, the target maps
them to its own tokens. Pure: no NumPy, no protobuf, no I/O. Refuses anything that is not canonical:
sorted, non-empty, inside the prompt, on UTF-8 code-point boundaries, and with at least one byte
between two neighbours (touching spans are one span).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from skim.errors import SpansNotCanonical


class Span(NamedTuple):
    """Half-open range [begin, end) in UTF-8 bytes of the prompt."""

    begin: int
    end: int


def merge(spans: Iterable[Span]) -> list[Span]:
    """Sort spans and join those that overlap or touch; empty spans vanish."""
    merged: list[Span] = []
    for span in sorted(spans):
        if span.begin >= span.end:
            continue
        if merged and span.begin <= merged[-1].end:
            merged[-1] = Span(merged[-1].begin, max(merged[-1].end, span.end))
        else:
            merged.append(Span(*span))
    return merged


def is_boundary(prompt: bytes, offset: int) -> bool:
    """Tell whether a code point starts at `offset`, or the prompt ends there."""
    return offset == len(prompt) or (0 <= offset < len(prompt) and prompt[offset] & 0xC0 != 0x80)


def round_outward(span: Span, prompt: bytes) -> Span:
    """Widen a span to whole code points; offsets past the end are cut to the end."""
    begin, end = max(0, span.begin), min(len(prompt), span.end)
    while begin > 0 and not is_boundary(prompt, begin):
        begin -= 1
    while end < len(prompt) and not is_boundary(prompt, end):
        end += 1
    return Span(begin, end)


def canonical(spans: Iterable[Span], prompt: bytes) -> list[Span]:
    """Make any spans canonical: empty ones dropped, outward to code points, then merged."""
    return merge(round_outward(span, prompt) for span in spans if span.begin < span.end)


def check_canonical(spans: Sequence[Span], prompt: bytes) -> None:
    """Refuse spans that are not canonical for this prompt.

    Raises:
        SpansNotCanonical: names the index of the first offending span and what is wrong with it.
    """
    previous_end = -1
    for index, (begin, end) in enumerate(spans):
        problem = None
        if begin >= end:
            problem = "is empty or reversed"
        elif end > len(prompt):
            problem = f"ends past the prompt's {len(prompt)} bytes"
        elif begin <= previous_end:
            problem = "overlaps, touches or precedes the span before it"
        elif not is_boundary(prompt, begin) or not is_boundary(prompt, end):
            problem = "cuts a UTF-8 code point"
        if problem:
            raise SpansNotCanonical(
                f"span {index} [{begin}, {end}) {problem}",
                field=f"spans[{index}]",
                got=f"[{begin}, {end})",
                allowed="sorted, non-empty, apart, inside the prompt, on code-point boundaries",
            )
        previous_end = end


def encode(spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Delta-code spans as (gaps, lengths), both in bytes.

    `gaps[0]` counts from the start of the prompt, `gaps[i]` from the end of span i - 1.
    """
    gaps, lengths, previous_end = [], [], 0
    for begin, end in spans:
        gaps.append(begin - previous_end)
        lengths.append(end - begin)
        previous_end = end
    return gaps, lengths


def decode(gaps: Sequence[int], lengths: Sequence[int], prompt: bytes) -> list[Span]:
    """Read delta-coded spans and check that they are canonical for `prompt`.

    Raises:
        SpansNotCanonical: the two lists differ in length, or the spans are not canonical.
    """
    if len(gaps) != len(lengths):
        raise SpansNotCanonical(
            f"spans.gaps and spans.lengths must have one entry per span, "
            f"got {len(gaps)} and {len(lengths)}",
            field="spans",
            got=f"{len(gaps)} gaps, {len(lengths)} lengths",
            allowed="equal counts",
        )
    spans, previous_end = [], 0
    for gap, length in zip(gaps, lengths, strict=True):
        begin = previous_end + gap
        previous_end = begin + length
        spans.append(Span(begin, previous_end))
    check_canonical(spans, prompt)
    return spans


def kept_bytes(spans: Sequence[Span]) -> int:
    """Count the bytes inside canonical spans."""
    return sum(end - begin for begin, end in spans)


def tokens_overlapping(token_ends: Sequence[int], spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Find the tokens that overlap a span by at least one byte.

    Args:
        token_ends: end offset in bytes of each token, non-decreasing; token i covers
            [token_ends[i - 1], token_ends[i]). A token of zero bytes never starts or ends a range.
        spans: canonical spans of the same prompt.
    Returns:
        Half-open ranges of token indices, sorted and disjoint (touching ranges are joined).
    """
    ranges: list[tuple[int, int]] = []
    for begin, end in spans:
        # First token that ends after `begin`, up to the first token that starts at or after `end`.
        first = bisect_right(token_ends, begin)
        last = bisect_right(token_ends, end - 1, lo=first) + 1
        last = min(last, len(token_ends))
        if first >= last:
            continue
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], last))
        else:
            ranges.append((first, last))
    return ranges
