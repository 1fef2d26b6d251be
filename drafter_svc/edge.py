"""Between the wire's messages and the values of `pipeline`: checks on the way in, none out.

With `service.py` and `admin.py` the only modules of the drafter that see generated messages.
Refuses every value out of range by the name of its field, before a byte of the prompt is taken.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

from drafter_svc.backend import SCORERS
from drafter_svc.config import DrafterSettings
from drafter_svc.drafter import Drafter
from drafter_svc.pipeline import Ask, Skimmed
from drafter_svc.scorers import ATTENTION_SCORERS
from drafter_svc.selection import Outcome, SelectionConfig
from skim.errors import InvalidRequest
from skim.spans import Span
from skim.timing import Stopwatch
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2
from skim.wire import ranges_from_proto, spans_to_proto

MAX_REQUEST_ID = 128
MAX_PROTECTED = 4_096
MAX_CONTROL_RANGES = 16_384  # a template writes two a message; 8,192 messages are absurd enough
MAX_PROTECT_TAIL_TOKENS = 65_536
MAX_EDGE_CHUNKS = 1_024
MAX_NEIGHBOUR_CHUNKS = 64
MAX_LOOKAHEAD_TOKENS = 32

_OUTCOMES = {
    Outcome.KEEP_RATIO: drafter_pb2.SELECTION_OUTCOME_KEEP_RATIO,
    Outcome.COVERAGE: drafter_pb2.SELECTION_OUTCOME_COVERAGE,
    Outcome.LOW_COVERAGE: drafter_pb2.SELECTION_OUTCOME_LOW_COVERAGE,
    Outcome.FORCED_ONLY: drafter_pb2.SELECTION_OUTCOME_FORCED_ONLY,
}


def _require(ok: bool, field: str, got: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequest.field_value(f"config.{field}", got, allowed)


def ask_from_proto(config: drafter_pb2.ScoreConfig, settings: DrafterSettings) -> Ask:
    """Check a request's config and fill what it leaves unset.

    Raises:
        InvalidRequest: a field is out of range; names it, what came and what is allowed.
    """
    _require(
        len(config.request_id) <= MAX_REQUEST_ID,
        "request_id",
        f"{len(config.request_id)} characters",
        f"at most {MAX_REQUEST_ID} characters",
    )
    _at_most(config.protect_tail_tokens, MAX_PROTECT_TAIL_TOKENS, "protect_tail_tokens")
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
        query=_query(config),
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
        _require(coverage is None, "selection.coverage", coverage, f"unset {because}")
        _require(lookahead == 0, "scoring.lookahead_tokens", lookahead, f"0 {because}")
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
    )
    if selection.coverage is not None:
        result.coverage = selection.coverage
    return drafter_pb2.ScoreResponse(result=result)


def progress_to_proto(stage: pb.Stage, done: int, total: int) -> drafter_pb2.ScoreResponse:
    """Build a progress event."""
    return drafter_pb2.ScoreResponse(progress=pb.Progress(stage=stage, done=done, total=total))


def _selection(message: pb.SelectionConfig, default: SelectionConfig) -> SelectionConfig:
    both = message.HasField("keep_ratio") and message.HasField("coverage")
    _require(not both, "selection", "keep_ratio and coverage", "one of keep_ratio and coverage")
    given: dict[str, float] = {}
    for name in ("keep_ratio", "coverage", "min_keep", "max_keep"):
        if message.HasField(name):
            got = getattr(message, name)
            _require(0.0 < got <= 1.0, f"selection.{name}", got, "in (0, 1]")
            given[name] = _decimal(got)
    chunks: dict[str, int] = {}
    for name, limit in (
        ("head_chunks", MAX_EDGE_CHUNKS),
        ("tail_chunks", MAX_EDGE_CHUNKS),
        ("neighbour_chunks", MAX_NEIGHBOUR_CHUNKS),
    ):
        if message.HasField(name):
            chunks[name] = _at_most(getattr(message, name), limit, f"selection.{name}")
    least, most = given.get("min_keep"), given.get("max_keep")
    if least is not None and most is not None:
        _require(least <= most, "selection.max_keep", most, f"at least min_keep, {least}")
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
    if message.HasField("scorer"):
        allowed = f"one of {', '.join(SCORERS)}"
        _require(message.scorer in SCORERS, "scoring.scorer", message.scorer, allowed)
        ask = replace(ask, scorer=message.scorer)
    attention = ask.attention
    if message.HasField("alpha"):
        _require(0.0 <= message.alpha <= 1.0, "scoring.alpha", message.alpha, "in [0, 1]")
        attention = replace(attention, alpha=_decimal(message.alpha))
    if message.HasField("max_density"):
        got = message.max_density
        _require(0.0 < got <= 1.0, "scoring.max_density", got, "in (0, 1]")
        attention = replace(attention, max_density=_decimal(got))
    lookahead = _at_most(message.lookahead_tokens, MAX_LOOKAHEAD_TOKENS, "scoring.lookahead_tokens")
    return replace(ask, attention=attention, lookahead_tokens=lookahead, seed=message.seed)


def _query(config: drafter_pb2.ScoreConfig) -> Span | None:
    if not config.HasField("query"):
        return None
    begin, end = config.query.begin, config.query.end
    _require(begin < end, "query", f"[{begin}, {end})", "a range with begin < end")
    return Span(begin, end)


def _at_most(got: int, limit: int, field: str) -> int:
    _require(got <= limit, field, got, f"in [0, {limit}]")
    return got


def _decimal(value: float) -> float:
    """The decimal that was meant by a float32 from the wire: 0.1, not 0.10000000149."""
    return float(f"{value:.7g}")
