"""Between the wire's messages and the values of `pipeline`: checks on the way in, none out.

With `service.py` and `admin.py` the only modules of the drafter that see generated messages.
Refuses every value out of range by the name of its field, before a byte of the prompt is taken.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

from drafter_svc.config import DrafterSettings
from drafter_svc.drafter import Drafter
from drafter_svc.pipeline import Ask, Skimmed
from drafter_svc.residency import Phase, Residency
from drafter_svc.scorers import ATTENTION_SCORERS
from drafter_svc.selection import Outcome, SelectionConfig
from skim.request_checks import (
    MAX_CONTROL_RANGES,
    MAX_PROTECT_TAIL_TOKENS,
    check_request_id,
    check_scoring,
    check_selection,
    check_whole,
    decimal,
    query_range,
    require,
)
from skim.timing import Stopwatch
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2
from skim.wire import ranges_from_proto, spans_to_proto

MAX_PROTECTED = 4_096

_OUTCOMES = {
    Outcome.KEEP_RATIO: drafter_pb2.SELECTION_OUTCOME_KEEP_RATIO,
    Outcome.COVERAGE: drafter_pb2.SELECTION_OUTCOME_COVERAGE,
    Outcome.LOW_COVERAGE: drafter_pb2.SELECTION_OUTCOME_LOW_COVERAGE,
    Outcome.FORCED_ONLY: drafter_pb2.SELECTION_OUTCOME_FORCED_ONLY,
}
_RESIDENCIES = {
    Phase.LOST: drafter_pb2.RESIDENCY_STATE_PARKED,  # off the device, until a landlord is back
    Phase.PARKED: drafter_pb2.RESIDENCY_STATE_PARKED,
    Phase.ARRIVING: drafter_pb2.RESIDENCY_STATE_UNPARKING,
    Phase.RESIDENT: drafter_pb2.RESIDENCY_STATE_RESIDENT,
    Phase.LEAVING: drafter_pb2.RESIDENCY_STATE_PARKING,
    Phase.FAILED: drafter_pb2.RESIDENCY_STATE_FAILED,
}


def ask_from_proto(config: drafter_pb2.ScoreConfig, settings: DrafterSettings) -> Ask:
    """Check a request's config and fill what it leaves unset.

    Raises:
        InvalidRequest: a field is out of range; names it, what came and what is allowed.
    """
    check_request_id(config.request_id)
    check_selection(config.selection)
    check_scoring(config.scoring)
    check_whole(config, "protect_tail_tokens", 0, MAX_PROTECT_TAIL_TOKENS)
    ask = Ask(
        request_id=config.request_id or str(uuid.uuid4()),
        model=config.model,
        scorer=settings.scorer,
        pool_kernel=settings.pool_kernel,
        last_token_query=settings.last_token_query,
        attention=settings.attention(),
        selection=_selection(config.selection, settings.selection()),
        protected=tuple(
            ranges_from_proto(config.protected, "config.protected", max_count=MAX_PROTECTED)
        ),
        query=query_range(config.query) if config.HasField("query") else None,
        protect_tail_tokens=config.protect_tail_tokens,
        control_ranges=tuple(
            ranges_from_proto(
                config.control_ranges,
                "config.control_ranges",
                max_count=MAX_CONTROL_RANGES,
                disjoint=True,
            )
        ),
    )
    ask = _scoring(config.scoring, ask)
    if ask.scorer not in ATTENTION_SCORERS:
        coverage, lookahead = ask.selection.coverage, ask.lookahead_tokens
        because = f"for the scorer {ask.scorer}, which runs no model"
        require(coverage is None, "selection.coverage", coverage, f"unset {because}")
        require(lookahead == 0, "scoring.lookahead_tokens", lookahead, f"0 {because}")
    return ask


def result_to_proto(
    skimmed: Skimmed, drafter: Drafter, ask: Ask, prompt_bytes: int, watch: Stopwatch
) -> drafter_pb2.ScoreResponse:
    """Build the last message of a Score; `watch` has the stages `queue` and `tokenise`."""
    scores, selection = skimmed.scores, skimmed.selection
    result = drafter_pb2.ScoreResult(
        spans=spans_to_proto(skimmed.spans, prompt_bytes),
        outcome=_OUTCOMES[selection.outcome],
        prompt_tokens=skimmed.prompt_tokens,
        kept_tokens=selection.kept_tokens,
        layer_density=scores.density,
        cut_row_share=scores.cut_row_share,
        yarn_factor=scores.yarn_factor,
        scorer=ask.scorer,
        queue_s=watch["queue"],
        tokenise_s=watch["tokenise"],
        forward_s=skimmed.forward_s,
        select_s=skimmed.select_s,
        model=drafter.name,
        model_digest=drafter.model_digest,
        memory_s=scores.memory_s,
    )
    if selection.coverage is not None:
        result.coverage = selection.coverage
    return drafter_pb2.ScoreResponse(result=result)


def residency_to_proto(residency: Residency | None) -> drafter_pb2.ResidencyState:
    """Say where the weights are; those that are the process's own are always there."""
    return _RESIDENCIES[Phase.RESIDENT if residency is None else residency.phase]


def progress_to_proto(stage: pb.Stage, done: int, total: int) -> drafter_pb2.ScoreResponse:
    """Build a progress event."""
    return drafter_pb2.ScoreResponse(progress=pb.Progress(stage=stage, done=done, total=total))


def _selection(message: pb.SelectionConfig, default: SelectionConfig) -> SelectionConfig:
    given = {
        name: decimal(getattr(message, name))
        for name in ("keep_ratio", "min_keep", "max_keep", "coverage")
        if message.HasField(name)
    }
    chunks = {
        name: getattr(message, name)
        for name in ("head_chunks", "tail_chunks", "neighbour_chunks")
        if message.HasField(name)
    }
    least, most = given.get("min_keep"), given.get("max_keep")
    # A bound that the caller set moves the default of the other one out of its way.
    return SelectionConfig(
        keep_ratio=given.get("keep_ratio", default.keep_ratio),
        coverage=given.get("coverage"),
        min_keep=min(default.min_keep, most or 1.0) if least is None else least,
        max_keep=max(default.max_keep, least or 0.0) if most is None else most,
        head_chunks=chunks.get("head_chunks", default.head_chunks),
        tail_chunks=chunks.get("tail_chunks", default.tail_chunks),
        neighbour_chunks=chunks.get("neighbour_chunks", default.neighbour_chunks),
    )


def _scoring(message: pb.ScoringConfig, ask: Ask) -> Ask:
    attention = ask.attention
    if message.HasField("alpha"):
        attention = replace(attention, alpha=decimal(message.alpha))
    if message.HasField("max_density"):
        attention = replace(attention, max_density=decimal(message.max_density))
    return replace(
        ask,
        scorer=message.scorer if message.HasField("scorer") else ask.scorer,
        attention=attention,
        lookahead_tokens=message.lookahead_tokens,
        seed=message.seed,
    )
