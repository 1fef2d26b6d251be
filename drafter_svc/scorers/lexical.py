"""Anchors without a model: chunks that repeat the question's rare words and phrases.

Each run of 1 to 4 tokens of the question that occurs elsewhere in the prompt marks its occurrences
with weight length / occurrences x (rarity of its tokens, each 1 / occurrences, summed): a phrase of
rare words found once is an anchor, common words are nothing, even in an order found once. The pool
spreads an anchor to its neighbours, where the answer stands.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drafter_svc.backend import ScoreInput
from kernels.reference import average_pool, chunk_mean

MAX_RUN_TOKENS = 4
# Without a named question the prompt's end asks; a question with its wording seldom exceeds this.
ASKING_TOKENS = 96
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: runs of ids hash without structure, modulo 2^64


class Lexical:
    """Scores by shared rare token runs."""

    name = "lexical"

    def score(self, request: ScoreInput) -> NDArray[np.float32]:
        """Give the pooled anchor weight per chunk; all zero when nothing is shared."""
        num_tokens = request.num_tokens
        begin, end = request.query_tokens or (max(0, num_tokens - ASKING_TOKENS), num_tokens)
        weights = np.zeros(num_tokens, dtype=np.float64)
        rarity = _rarity(request.ids, begin, end)
        for length in range(1, MAX_RUN_TOKENS + 1):
            _add_anchors(weights, request.ids, rarity, begin, end, length)
        weights[begin:end] = 0.0
        pooled = average_pool(weights.astype(np.float32), request.pool_kernel)
        return chunk_mean(pooled, request.chunk_tokens)


def _rarity(ids: NDArray[np.int32], begin: int, end: int) -> NDArray[np.float64]:
    """Give 1 / (occurrences outside the question) of each position's token."""
    counts = np.bincount(ids) - np.bincount(ids[begin:end], minlength=int(ids.max()) + 1)
    return np.asarray(1.0 / np.maximum(1, counts[ids]))


def _add_anchors(
    weights: NDArray[np.float64],
    ids: NDArray[np.int32],
    rarity: NDArray[np.float64],
    begin: int,
    end: int,
    length: int,
) -> None:
    """Mark every occurrence, outside the question, of the question's runs of `length` tokens."""
    num_runs = ids.size - length + 1
    if end - begin < length or num_runs <= 0:
        return
    runs = np.zeros(num_runs, dtype=np.uint64)
    for offset in range(length):
        runs = runs * _HASH_BASE + ids[offset : offset + num_runs].astype(np.uint64)
    asked = np.unique(runs[begin : end - length + 1])
    place = np.minimum(np.searchsorted(asked, runs), asked.size - 1)
    found = asked[place] == runs
    found[max(0, begin - length + 1) : end] = False  # the question does not answer itself
    counts = np.bincount(place[found], minlength=asked.size)
    starts = np.flatnonzero(found)
    weight = length / counts[place[starts]] * sum(rarity[starts + i] for i in range(length))
    for offset in range(length):
        weights[starts + offset] += weight  # starts are distinct: no two adds meet
