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

from skim.errors import InvalidRequest

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
