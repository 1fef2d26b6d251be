"""What happened to one request: gathered as it runs, told once to the caller and once to the log.

`session` notes each answer of drafter and target here. Counts are the target's, timings are the
gateway's where it can see both ends of a stage and the services' own otherwise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gateway.clients import full_reason_to_proto
from gateway.plan import Decision, Full, Skim
from gateway.rendering import Layout
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2, gateway_pb2, target_pb2
from skim.wire import spans_to_proto


@dataclass
class Report:
    """The record of one request. Moments are seconds on the monotonic clock."""

    began_s: float = field(default_factory=time.monotonic)
    drafter: str = ""
    uploaded_s: float | None = None
    first_token_s: float | None = None
    score_lost_s: float = 0.0
    result: drafter_pb2.ScoreResult | None = None
    tokenised: target_pb2.Tokenised | None = None
    started: target_pb2.PrefillStarted | None = None
    decision: Decision | None = None
    finish: gateway_pb2.Finish | None = None

    def since_began_s(self, moment_s: float | None) -> float:
        """Seconds from the request's first byte to a moment; 0 when it never came."""
        return 0.0 if moment_s is None else moment_s - self.began_s

    def plan_summary(self, layout: Layout, *, want_spans: bool) -> gateway_pb2.PlanSummary:
        """Tell what was decided."""
        degraded = self.started is not None and self.started.degraded
        summary = gateway_pb2.PlanSummary(
            skimmed=isinstance(self.decision, Skim) or degraded, degraded=degraded
        )
        spans = None
        if isinstance(self.decision, Full):
            if not degraded:
                summary.full_reason = full_reason_to_proto(self.decision.reason)
            summary.detail = self.decision.detail
            spans = self.decision.fallback if degraded else None
        elif self.decision is not None:
            spans = self.decision.spans
        if self.result is not None:
            _add_result(summary, self.result)
        if want_spans and spans is not None:
            kept = spans_to_proto(layout.to_upload(spans), layout.upload_bytes)
            summary.spans.CopyFrom(kept)
        return summary

    def finished(self, finish: target_pb2.TargetFinish, prompt_bytes: int) -> gateway_pb2.Finish:
        """Tell how it ended, and where the time went."""
        now_s = time.monotonic()
        result = self.result or drafter_pb2.ScoreResult()
        started = self.started or target_pb2.PrefillStarted()
        tokenised = self.tokenised or target_pb2.Tokenised()
        scored_s = result.tokenise_s + result.forward_s + result.select_s
        timings = pb.Timings(
            upload_s=self.since_began_s(self.uploaded_s),
            queue_s=result.queue_s + started.queue_s,
            tokenise_s=tokenised.tokenise_s,
            score_s=scored_s if self.result is not None else self.score_lost_s,
            select_s=result.select_s,
            park_s=started.park_s,
            map_s=started.map_s,
            unpark_s=result.memory_s,
            prefill_s=finish.prefill_s,
            ttft_s=self.since_began_s(self.first_token_s),
            decode_s=finish.decode_s,
            total_s=now_s - self.began_s,
        )
        self.finish = gateway_pb2.Finish(
            reason=finish.reason,
            usage=finish.usage,
            timings=timings,
            seed=finish.seed,
            positions=started.positions,
            speculation=finish.speculation,
        )
        self.finish.usage.prompt_bytes = prompt_bytes
        return self.finish

    def log_fields(self) -> dict[str, object]:
        """Counts and seconds for the log; no text."""
        fields: dict[str, object] = {
            "drafter": self.drafter,
            "total_s": round(self.since_began_s(time.monotonic()), 4),
        }
        if isinstance(self.decision, Full):
            fields["plan"] = "full"
            fields["full_reason"] = self.decision.reason.value
            fields["detail"] = self.decision.detail
        elif self.decision is not None:
            fields["plan"] = "skim"
        if self.finish is None:
            return fields
        usage, timings = self.finish.usage, self.finish.timings
        fields |= {name.name: value for name, value in usage.ListFields()}
        fields |= {name.name: round(value, 4) for name, value in timings.ListFields()}
        return fields


def _add_result(summary: gateway_pb2.PlanSummary, result: drafter_pb2.ScoreResult) -> None:
    summary.drafter_prompt_tokens = result.prompt_tokens
    summary.drafter_kept_tokens = result.kept_tokens
    if result.HasField("coverage"):
        summary.coverage = result.coverage
    if result.layer_density:
        summary.density = sum(result.layer_density) / len(result.layer_density)
        summary.layer_density.extend(result.layer_density)
    summary.cut_row_share = result.cut_row_share
    summary.forced_only = result.outcome == drafter_pb2.SELECTION_OUTCOME_FORCED_ONLY
    summary.yarn_factor = result.yarn_factor
    summary.scorer = result.scorer
