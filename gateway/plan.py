"""Decide what the target prefills: the drafter's spans or the whole prompt, and say why.

Pure: `session` tells it what happened and when, it answers with one decision that never changes.
The order of the rules is the order of the questions: was a full prefill asked for, is there a
drafter, is the prompt long enough to pay, did the drafter answer in time, does its answer suffice.
No failure of a drafter is an error here; each becomes a full prefill with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from skim.spans import Span

# The late clock's default: this share of the full prefill that skimming would save us.
LATE_SHARE_OF_FULL = 0.25
LATE_AT_LEAST_S = 2.0
# Used while the target has no measured rate to predict a full prefill with.
LATE_UNMEASURED_S = 30.0


class Mode(Enum):
    """How the caller wants the prompt treated."""

    AUTO = "auto"
    FULL = "full"
    SKIM = "skim"


class Reason(Enum):
    """Why a prompt is prefilled whole."""

    FORCED = "forced"
    SHORT_PROMPT = "short_prompt"
    NO_DRAFTER = "no_drafter"
    DRAFTER_FAILED = "drafter_failed"
    DRAFTER_LATE = "drafter_late"
    LOW_COVERAGE = "low_coverage"
    SPANS_REFUSED = "spans_refused"


@dataclass(frozen=True)
class Skim:
    """Prefill these canonical spans of the rendered prompt."""

    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Full:
    """Prefill everything.

    Attributes:
        reason: why.
        detail: one sentence for people about what went wrong; empty when nothing did.
        fallback: spans to use where a full prefill does not fit, or None.
    """

    reason: Reason
    detail: str = ""
    fallback: tuple[Span, ...] | None = None


Decision = Skim | Full


class Planner:
    """The state of one request's plan. Moments are seconds on one monotonic clock.

    Args:
        mode: what the caller wants.
        skim_min_tokens: prompts of fewer target tokens are prefilled whole in mode AUTO.
        no_drafter: sentence that says why no drafter can be asked, or None when one can.
        score_timeout_s: how long a drafter may run one request; None: derived from the target's
            estimate of a full prefill.
    """

    def __init__(
        self,
        *,
        mode: Mode,
        skim_min_tokens: int,
        no_drafter: str | None = None,
        score_timeout_s: float | None = None,
    ) -> None:
        self._mode = mode
        self._skim_min_tokens = skim_min_tokens
        self._score_timeout_s = score_timeout_s
        self._late_after_s = score_timeout_s
        self._counted = False
        self._scored: Decision | None = None
        # The late clock: seconds run so far, and since when it runs (None: it stands).
        self._ran_s = 0.0
        self._running_since_s: float | None = None
        self._queued = False
        self.decision: Decision | None = None
        if mode is Mode.FULL:
            self.decision = Full(Reason.FORCED)
        elif no_drafter is not None:
            self.decision = Full(Reason.NO_DRAFTER, no_drafter)

    def opens_score(self, known_bytes: int) -> bool:
        """Tell whether a prompt of at least `known_bytes` bytes is worth asking the drafter.

        A token is at least one byte, so fewer bytes than `skim_min_tokens` are too few tokens.
        """
        if self.decision is not None:
            return False
        return self._mode is Mode.SKIM or known_bytes >= self._skim_min_tokens

    def uploaded(self, at_s: float, *, score_open: bool) -> None:
        """The whole prompt was sent on. From here on a drafter that says nothing counts as running.

        Args:
            score_open: whether a drafter was asked; if not, the prompt was too short for it.
        """
        if not score_open:
            self._decide(Full(Reason.SHORT_PROMPT))
        elif not self._queued and self._running_since_s is None:
            self._running_since_s = at_s

    def tokenised(self, prompt_tokens: int, full_estimate_s: float) -> None:
        """The target has counted the prompt and predicts a full prefill (0: it has no rate yet)."""
        self._counted = True
        if self._score_timeout_s is None:
            measured_s = max(LATE_AT_LEAST_S, LATE_SHARE_OF_FULL * full_estimate_s)
            self._late_after_s = measured_s if full_estimate_s > 0 else LATE_UNMEASURED_S
        if self._mode is Mode.AUTO and prompt_tokens < self._skim_min_tokens:
            self._decide(Full(Reason.SHORT_PROMPT))
        elif self._scored is not None:
            self._decide(self._scored)

    def queued(self, at_s: float) -> None:
        """The drafter says that the request waits, for its turn or for memory: the clock stands."""
        self._queued = True
        if self._running_since_s is not None:
            self._ran_s += at_s - self._running_since_s
            self._running_since_s = None

    def running(self, at_s: float) -> None:
        """The drafter says that it works on this request: the late clock runs."""
        self._queued = False
        if self._running_since_s is None:
            self._running_since_s = at_s

    def scored(self, spans: Sequence[Span], *, low_coverage: str | None = None) -> None:
        """The drafter answered with canonical spans.

        Args:
            spans: canonical and not empty.
            low_coverage: sentence that says which coverage was missed, or None when it was met.
        """
        if low_coverage is None:
            self._scored = Skim(tuple(spans))
        else:
            self._scored = Full(Reason.LOW_COVERAGE, low_coverage, tuple(spans))
        # In mode AUTO a prompt that turns out short is prefilled whole, so its count comes first.
        if self._counted or self._mode is Mode.SKIM:
            self._decide(self._scored)

    def score_failed(self, reason: Reason, detail: str) -> None:
        """The drafter's answer will not come, or cannot be used."""
        if self._scored is None:
            self._decide(Full(reason, detail))

    def late_at_s(self) -> float | None:
        """The moment at which the drafter is late if nothing changes; None: the clock stands."""
        if self._running_since_s is None or self._late_after_s is None or self._scored is not None:
            return None
        return self._running_since_s + self._late_after_s - self._ran_s

    def time_passed(self, at_s: float) -> None:
        """Give the drafter up if it is late."""
        late_at_s = self.late_at_s()
        if late_at_s is not None and at_s >= late_at_s:
            self._decide(
                Full(
                    Reason.DRAFTER_LATE,
                    f"the drafter had not answered after running for {self._late_after_s:.2f} s",
                )
            )

    def _decide(self, decision: Decision) -> None:
        if self.decision is None:
            self.decision = decision
