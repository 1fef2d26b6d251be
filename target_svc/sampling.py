"""Choose the next token from one row of logits.

Called by the engine for every row of a decode or verify batch; the service builds `Sampling` from
a request. Pure NumPy, no clock, no global state: same row, settings and draws, same token.

Order, as in vLLM and `transformers`: temperature, then top_k, then top_p, then min_p, each on the
distribution that the one before left (renormalised). Temperature 0 is greedy and ignores the rest.
Log-probabilities are those of the raw row, before any of it. Refuses rows without one finite entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from skim.errors import EngineFault, InvalidRequest

MAX_TOP_LOGPROBS = 20  # the limit users know from other servers


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; the defaults are greedy.

    Attributes:
        temperature: >= 0; 0 is greedy.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the smallest set of probability >= top_p, (0, 1]; 1 keeps all.
        min_p: drop tokens under min_p times the most likely one's probability, [0, 1]; 0 keeps all.
        seed: [0, 2^64): one generator a request, one draw an emitted token.
        top_logprobs: None: no log-probabilities; 0: the chosen token's; n: also the n most likely.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    top_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InvalidRequest: a field is not finite or out of range; names field, got and allowed.
        """
        wrong = InvalidRequest.field_value
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise wrong("sampling.temperature", self.temperature, "finite and >= 0")
        if self.top_k < 0:
            raise wrong("sampling.top_k", self.top_k, ">= 0")
        if not 0.0 < self.top_p <= 1.0:
            raise wrong("sampling.top_p", self.top_p, "in (0, 1]")
        if not 0.0 <= self.min_p <= 1.0:
            raise wrong("sampling.min_p", self.min_p, "in [0, 1]")
        if not 0 <= self.seed < 1 << 64:
            raise wrong("sampling.seed", self.seed, "in [0, 2^64)")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise wrong("sampling.top_logprobs", self.top_logprobs, f"in [0, {MAX_TOP_LOGPROBS}]")


class TokenLogprobs(NamedTuple):
    """Natural logs under the raw row: the chosen token's, and the n most likely, best first."""

    chosen: float
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


class Sampler:
    """Chooses the tokens of one request; one draw of its own generator an emitted token."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)

    def choose(self, row: NDArray[np.float32]) -> int:
        """Choose one token.

        Args:
            row: float32 [n_vocab] logits; NaN and -inf are tokens that cannot be chosen.
        Raises:
            EngineFault: no entry is finite, or one is +inf: the model's output is broken.
        """
        best = int(np.argmax(row))  # a NaN, if there is one; else the lowest id of the maximum
        if not math.isfinite(row[best]):
            row = _without_nan(row)
            best = int(np.argmax(row))
        if self.sampling.greedy:
            return best
        ids, weights = candidates(row, self.sampling)
        cumulative = np.cumsum(weights)
        point = self._generator.random() * cumulative[-1]
        # side="right" never lands on a token of weight 0; the minimum guards the last rounding.
        index = min(int(np.searchsorted(cumulative, point, side="right")), len(ids) - 1)
        return int(ids[index])

    def logprobs(self, row: NDArray[np.float32], token: int) -> TokenLogprobs:
        """Give the log-probabilities that the request asked for; see `Sampling.top_logprobs`."""
        if not math.isfinite(row[int(np.argmax(row))]):
            row = _without_nan(row)
        logits = row.astype(np.float64)
        peak = logits.max()
        log_total = peak + math.log(np.exp(logits - peak).sum())
        ids = _largest(logits, self.sampling.top_logprobs or 0)
        return TokenLogprobs(
            float(logits[token] - log_total),
            ids.astype(np.int32),
            (logits[ids] - log_total).astype(np.float32),
        )


def candidates(
    row: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Apply temperature, top_k, top_p and min_p.

    Returns:
        ids and weights [m >= 1] (not normalised), most likely first, ties by id; in id order when
        nothing is filtered, since sorting a large vocabulary would cost more than the draw.
    """
    logits = row.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to exp(-inf) = 0
        weights = np.exp((logits - logits.max()) / sampling.temperature)
    total = weights.sum()
    if sampling.top_k:
        ids = _largest(weights, min(sampling.top_k, len(weights)))
        total = weights[ids].sum()
    elif sampling.top_p < 1.0:
        ids = _nucleus(weights, sampling.top_p * total)
    elif sampling.min_p > 0.0:
        ids = _largest(weights, int((weights >= sampling.min_p).sum()))  # the best weighs 1
    else:
        return np.arange(len(weights)), weights
    kept = weights[ids]
    if sampling.top_p < 1.0:
        # The first token at which the sum reaches top_p is the last one kept.
        count = int(np.searchsorted(np.cumsum(kept), sampling.top_p * total, side="left")) + 1
        ids, kept = ids[:count], kept[:count]
    if sampling.min_p > 0.0:
        count = int((kept >= sampling.min_p * kept[0]).sum())
        ids, kept = ids[:count], kept[:count]
    return ids, kept


def _nucleus(weights: NDArray[np.float64], mass: float) -> NDArray[np.intp]:
    """Give the largest weights, sorted, until they hold at least `mass`."""
    count = 256  # nearly always enough; sorting 150,000 entries for each token is not needed
    while count < len(weights):
        ids = _largest(weights, count)
        if weights[ids].sum() >= mass:
            return ids
        count *= 8
    return _largest(weights, len(weights))


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Give the ids of the `count` largest values, largest first, ties by the lower id."""
    if count == 0:
        return np.zeros(0, np.intp)
    if count < len(values):
        # argpartition breaks ties as it likes, so only its threshold is used.
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > threshold)
        level = np.flatnonzero(values == threshold)[: count - len(above)]
        ids = np.concatenate((above, level))
    else:
        ids = np.arange(len(values))
    return ids[np.lexsort((ids, -values[ids]))]


def _without_nan(row: NDArray[np.float32]) -> NDArray[np.float32]:
    clean = np.where(np.isnan(row), np.float32(-np.inf), row)
    if not math.isfinite(clean.max()):
        raise EngineFault("the model's logits are not finite", reason="LOGITS_NOT_FINITE")
    return clean
