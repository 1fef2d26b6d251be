"""Choose what is prefilled and in which context: the ways to serve a plan, the preferred first.

Pure, between the checked plan and the queue. A plan that fits a slot of the working context goes
there, a larger one needs the full context; where a full plan fits neither, its fallback spans are
the second way, and the answer is called degraded. Refuses plans that no context holds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from skim.errors import Busy, PreconditionFailed
from skim.spans import Span
from target_svc.admission import LaneName
from target_svc.compaction import Compacted, TokenisedPrompt, compact
from target_svc.memory.full_context import FullContextBudget
from target_svc.messages import Ready
from target_svc.request import Ask, Plan


@dataclass(frozen=True)
class Route:
    """One way to serve a plan.

    Attributes:
        kept: tokens to prefill and their positions.
        lane: the context it needs.
        original: whether the positions are those of the whole prompt.
        degraded: the fallback's spans stand in for a full prefill.
        map_s: seconds spent on mapping spans to tokens.
    """

    kept: Compacted
    lane: LaneName
    original: bool
    degraded: bool
    map_s: float


class Router:
    """Knows the model's rope and the sizes of the contexts.

    Args:
        facts: what the engine said about its model.
        budget: of the full context.
        kept_max: prompt tokens that fit a slot of the working context.
    """

    def __init__(self, facts: Ready, budget: FullContextBudget, *, kept_max: int) -> None:
        self._facts = facts
        self._budget = budget
        self._kept_max = kept_max

    @property
    def full_max_tokens(self) -> int:
        """Prompt tokens of the longest full prefill, in whichever context."""
        return max(self._kept_max, self._budget.max_tokens)

    def require_positions(self, ask: Ask) -> None:
        """Refuse original positions where the model's rope cannot have gaps.

        Raises:
            PreconditionFailed: reason POSITIONS_NOT_SUPPORTED.
        """
        if ask.positions == "original" and not self._facts.allows_gaps:
            raise PreconditionFailed(
                f"the model's rope ({self._facts.rope_type}) takes no gaps between positions: "
                "ORIGINAL needs multimodal rope",
                reason="POSITIONS_NOT_SUPPORTED",
                field="config.positions",
                got="ORIGINAL",
                allowed="COMPACTED",
            )

    def routes(self, ask: Ask, prompt: TokenisedPrompt, size: int, plan: Plan) -> list[Route]:
        """List the ways to serve a plan, the preferred one first; never empty.

        Args:
            ask: the request.
            prompt: in tokens.
            size: of the prompt in bytes.
            plan: what was planned.
        Raises:
            Busy: reason FULL_PREFILL_IMPOSSIBLE: nothing that was planned fits any context.
        """
        whole = (Span(0, size),)
        ways: list[tuple[Sequence[Span], bool]] = [(plan.spans or whole, False)]
        if plan.spans is None and plan.fallback is not None:
            ways.append((plan.fallback, True))
        routes = [self._route(ask, prompt, spans, degraded=degraded) for spans, degraded in ways]
        fitting = [route for route in routes if route.kept.num_tokens <= self.full_max_tokens]
        if not fitting:
            raise self.impossible(routes[0])
        return fitting

    def impossible(self, route: Route, limit_bytes: int | None = None) -> Busy:
        """Say that a route fits no context; `limit_bytes` is what one could have now, if known."""
        limit, got = self.full_max_tokens, route.kept.num_tokens
        if limit_bytes is not None:
            limit = min(limit, max(self._kept_max, self._budget.tokens_within(limit_bytes)))
        return Busy(
            f"this plan prefills {got} tokens, and there is memory for at most {limit}",
            reason="FULL_PREFILL_IMPOSSIBLE",
            metadata={"limit": str(limit), "got": str(got)},
        )

    def _route(
        self, ask: Ask, prompt: TokenisedPrompt, spans: Sequence[Span], *, degraded: bool
    ) -> Route:
        begin_s = time.monotonic()
        original = ask.positions == "original" or (
            ask.positions == "auto"
            and self._facts.allows_gaps
            # Past the trained context only compaction keeps the positions among the trained ones.
            and prompt.num_tokens + ask.max_tokens <= self._facts.n_ctx_train
        )
        kept = compact(prompt, spans, original=original)
        lane: LaneName = "working" if kept.num_tokens <= self._kept_max else "full"
        return Route(kept, lane, original, degraded, time.monotonic() - begin_s)
