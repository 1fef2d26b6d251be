"""Anchors without a model: chunks that repeat the question's rare words and phrases.

Each run of 1 to 4 tokens of the question that occurs elsewhere in the prompt marks its occurrences
with weight (run length) / (number of occurrences): a phrase found once is an anchor, a word found
everywhere is nothing. The pool spreads an anchor to its neighbours, where the answer stands.
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
        weights = np.zeros(num_tokens, dtype=np.float32)
        for length in range(1, MAX_RUN_TOKENS + 1):
            _add_anchors(weights, request.ids, begin, end, length)
        weights[begin:end] = 0.0
        return chunk_mean(average_pool(weights, request.pool_kernel), request.chunk_tokens)


def _add_anchors(
    weights: NDArray[np.float32], ids: NDArray[np.int32], begin: int, end: int, length: int
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
    for offset in range(length):
        np.add.at(weights, starts + offset, np.float32(length) / counts[place[starts]])
