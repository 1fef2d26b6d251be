"""Choose which chunks of a prompt to keep, and turn them into spans.

The drafter's idea has its home here: a backend says how much each chunk matters, this module
decides what the target will prefill. Called by `pipeline` after the pass. Pure NumPy, no RPC, no
GPU, deterministic: ties go to the lower index. Refuses scores that are not finite, and a wish for
coverage when the scorer measures none.

Forced chunks are always kept; picks, best first, each with its neighbours, follow until one does
not fit the budget. So a larger keep_ratio keeps a superset of what a smaller one keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from skim.errors import EngineFault, InvalidRequest
from skim.spans import Span, canonical

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Scores = NDArray[np.float32]
Weights = NDArray[np.float64]

# A panel row with less of its mass than this outside the forced ranges says nothing about the rest.
MIN_FREE_MASS = 1e-3
# What adding up a few thousand float64 fractions, or ratio x tokens, may miss the exact value by.
ROUNDING = 1e-9


class Outcome(StrEnum):
    """How a selection ended."""

    KEEP_RATIO = "keep_ratio"  # the budget was filled
    COVERAGE = "coverage"  # the asked coverage was reached
    LOW_COVERAGE = "low_coverage"  # it was not, within max_keep
    FORCED_ONLY = "forced_only"  # the forced chunks alone passed keep_ratio


@dataclass(frozen=True)
class SelectionConfig:
    """How much to keep; every fraction counts tokens of the drafter, forced ones included."""

    keep_ratio: float = 0.1  # (0, 1]; ignored in coverage mode
    coverage: float | None = None  # asked coverage, (0, 1]; None: fill keep_ratio
    min_keep: float = 0.02  # least fraction kept in coverage mode, (0, 1]
    max_keep: float = 0.3  # largest fraction kept in coverage mode, [min_keep, 1]
    head_chunks: int = 1  # always kept at the prompt's start
    tail_chunks: int = 4  # always kept at the prompt's end
    neighbour_chunks: int = 1  # each pick brings so many on both sides, inside the budget


@dataclass(frozen=True)
class Selection:
    """What is kept.

    Attributes:
        kept: bool [num_chunks].
        kept_tokens: tokens in kept chunks.
        outcome: how it ended.
        coverage: smallest panel row's kept mass outside the forced chunks, [0, 1]; 1.0 when no row
            has mass there (nothing that is attended to can be lost); None without a panel.
    """

    kept: Bools
    kept_tokens: int
    outcome: Outcome
    coverage: float | None


def token_ranges(token_ends: Ints, spans: Sequence[Span]) -> Ints:
    """Find the tokens that overlap each non-empty span by at least one byte.

    `token_ends` is int64 [num_tokens], non-decreasing, in bytes. Returns int64 [num_spans, 2],
    half-open token ranges; tokens without bytes start and end none.
    """
    bounds = np.asarray(spans, np.int64).reshape(-1, 2)
    first = np.searchsorted(token_ends, bounds[:, 0], side="right")
    last = np.searchsorted(token_ends, bounds[:, 1] - 1, side="right") + 1
    return np.stack((first, np.minimum(last, len(token_ends))), axis=1)


def chunk_sizes(num_tokens: int, chunk_tokens: int) -> Ints:
    """Tokens in each chunk, int64 [num_chunks]; the last chunk may be short."""
    starts = np.arange(0, num_tokens, chunk_tokens, dtype=np.int64)
    return np.minimum(chunk_tokens, num_tokens - starts)


def forced_chunks(sizes: Ints, config: SelectionConfig, ranges: Ints) -> Bools:
    """Mark head, tail and all chunks that a half-open token range of int64 [n, 2] touches."""
    forced = np.zeros(sizes.size, np.bool_)
    forced[: config.head_chunks] = True
    forced[max(0, sizes.size - config.tail_chunks) :] = True
    for begin, end in ranges:
        if begin < end:
            forced[begin // sizes[0] : (end - 1) // sizes[0] + 1] = True
    return forced


def select(
    scores: Scores, panel: Scores | None, forced: Bools, sizes: Ints, config: SelectionConfig
) -> Selection:
    """Choose the chunks to keep.

    With nothing forced and room for no chunk, the best one is kept as if it were forced. Coverage
    mode ends in COVERAGE or LOW_COVERAGE, also where the forced chunks alone pass max_keep.

    Args:
        scores: float32 [num_chunks], higher is more important.
        panel: float32 [num_rows, num_chunks], attention mass by row, or None.
        forced: bool [num_chunks].
        sizes: tokens in each chunk.
    Raises:
        EngineFault: scores or panel are not finite.
        InvalidRequest: coverage is asked and there is no panel.
    """
    if not np.isfinite(scores).all() or not (panel is None or np.isfinite(panel).all()):
        raise EngineFault("the drafter's scores are not finite: its weights or its pass are broken")
    kept, neighbours = forced.copy(), config.neighbour_chunks
    weights = None if panel is None else _free_mass(panel, forced)
    if config.coverage is None:
        outcome = _fill_to_ratio(kept, scores, sizes, config.keep_ratio, neighbours)
    elif weights is None:
        allowed = "unset for a scorer without attention"
        raise InvalidRequest.field_value("selection.coverage", config.coverage, allowed)
    else:
        outcome = _fill_to_coverage(kept, scores, sizes, weights, config, config.coverage)
    coverage = None if weights is None else _coverage(weights, kept)
    return Selection(kept, int(sizes[kept].sum()), outcome, coverage)


def kept_spans(kept: Bools, token_ends: Ints, chunk_tokens: int, prompt: bytes) -> list[Span]:
    """Turn kept chunks into canonical spans: to bytes, outward to code points, merged."""
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False)).reshape(-1, 2)
    ends = np.concatenate((np.zeros(1, np.int64), token_ends))
    bounds = ends[np.minimum(edges * chunk_tokens, len(token_ends))]
    return canonical([Span(int(begin), int(end)) for begin, end in bounds], prompt)


def _with_neighbours(pick: int, neighbours: int, num_chunks: int) -> list[int]:
    """The pick, then its neighbours: nearest first, the lower index before the higher."""
    around = range(max(0, pick - neighbours), min(num_chunks, pick + neighbours + 1))
    return sorted(around, key=lambda chunk: (abs(chunk - pick), chunk))


def _order(scores: Scores, kept: Bools, neighbours: int) -> Ints:
    """Chunks that are not kept yet, in the order in which they should be; no budget matters here.

    A chunk that came as a neighbour brings its own when its turn comes; one kept before does not.
    """
    ranked = np.argsort(-scores, kind="stable")
    ranked = ranked[~kept[ranked]]
    if neighbours == 0:
        return ranked
    seen = kept.copy()
    order: list[int] = []
    for pick in ranked.tolist():
        fresh = [c for c in _with_neighbours(pick, neighbours, scores.size) if not seen[c]]
        seen[fresh] = True
        order += fresh
    return np.asarray(order, np.int64)


def _fill_to_ratio(
    kept: Bools, scores: Scores, sizes: Ints, ratio: float, neighbours: int
) -> Outcome:
    budget, used = _budget(ratio, sizes), int(sizes[kept].sum())
    if used > budget:
        return Outcome.FORCED_ONLY
    order = _order(scores, kept, neighbours)
    kept[order[used + np.cumsum(sizes[order]) <= budget]] = True
    if not kept.any():  # a selection is never empty
        kept[np.argmax(scores)] = True
        return Outcome.FORCED_ONLY
    return Outcome.KEEP_RATIO


def _fill_to_coverage(
    kept: Bools,
    scores: Scores,
    sizes: Ints,
    weights: Weights,
    config: SelectionConfig,
    asked: float,
) -> Outcome:
    """Cover every row, then fill by score up to min_keep; else what keep_ratio = max_keep keeps."""
    limit, neighbours = _budget(config.max_keep, sizes), config.neighbour_chunks
    covering = kept.copy()
    if not _cover(covering, weights, sizes, asked, limit, neighbours):
        _fill_to_ratio(kept, scores, sizes, config.max_keep, neighbours)
        reached = _coverage(weights, kept) >= asked - ROUNDING
        return Outcome.COVERAGE if reached else Outcome.LOW_COVERAGE
    kept |= covering
    order = _order(scores, kept, neighbours)
    before = int(sizes[kept].sum()) + np.cumsum(sizes[order]) - sizes[order]
    least = config.min_keep * int(sizes.sum()) - ROUNDING
    kept[order[(before < least) & (before + sizes[order] <= limit)]] = True
    return Outcome.COVERAGE


def _budget(fraction: float, sizes: Ints) -> int:
    return math.floor(fraction * int(sizes.sum()) + ROUNDING)


def _cover(
    kept: Bools, weights: Weights, sizes: Ints, asked: float, limit: int, neighbours: int
) -> bool:
    """Keep chunks until each row of `weights` has `asked` of its mass; False if `limit` ends it.

    The rule: the row that lacks most (ties: the lower row) takes its heaviest chunk that is not
    kept yet. For one row that is the smallest set. For several the smallest set is a set cover,
    and this comes near it (tests/unit/test_selection_coverage.py).
    """
    ranked = np.argsort(-weights, axis=1, kind="stable")
    turns = [iter(row.tolist()) for row in ranked]
    covered = weights[:, kept].sum(axis=1)
    used = int(sizes[kept].sum())
    while covered.size and covered.min() < asked - ROUNDING:
        row = int(covered.argmin())
        pick = next(chunk for chunk in turns[row] if not kept[chunk])
        for chunk in _with_neighbours(pick, neighbours, kept.size):
            if kept[chunk]:
                continue
            if used + sizes[chunk] > limit:
                return bool(covered.min() >= asked - ROUNDING)
            kept[chunk] = True
            used += int(sizes[chunk])
            covered += weights[:, chunk]
    return True


def _free_mass(panel: Scores, forced: Bools) -> Weights:
    """Take the forced chunks out of each row (0), scale the rest to 1, drop rows without a rest."""
    weights = np.where(forced, 0.0, panel.astype(np.float64))
    mass = weights.sum(axis=1)
    informative = mass >= MIN_FREE_MASS
    return np.asarray(weights[informative] / mass[informative, None])


def _coverage(weights: Weights, kept: Bools) -> float:
    return float(weights[:, kept].sum(axis=1).min(initial=1.0))
