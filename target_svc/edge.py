"""Between the wire's messages and the values of `request.py`: checks on the way in, none out.

With `service.py` the only module of the target that sees generated messages. Refuses every value
out of range by the name of its field, before anything is queued or computed.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable

from skim.errors import InvalidRequest, NotFound
from skim.request_checks import (
    MAX_CONTROL_RANGES,
    check_request_id,
    check_sampling,
    check_speculation,
    check_whole,
    require,
)
from skim.v1 import common_pb2 as pb
from skim.v1 import target_pb2
from skim.wire import ranges_from_proto, spans_from_proto
from target_svc.config import TargetSettings
from target_svc.request import (
    AnswerToken,
    Ask,
    Ended,
    EndReason,
    Event,
    Piece,
    Plan,
    Positions,
    Prefilled,
    Queued,
    Started,
    TokenScore,
)
from target_svc.sampling import Sampling

Response = target_pb2.TargetServiceGenerateResponse

DEFAULT_MAX_TOKENS = 256

_POSITIONS: dict[int, Positions] = {
    pb.POSITION_MODE_UNSPECIFIED: "auto",
    pb.POSITION_MODE_COMPACTED: "compacted",
    pb.POSITION_MODE_ORIGINAL: "original",
}
_END: dict[EndReason, pb.FinishReason] = {
    "eos": pb.FINISH_REASON_EOS,
    "stop_text": pb.FINISH_REASON_STOP_TEXT,
    "length": pb.FINISH_REASON_LENGTH,
}


def ask_from_proto(
    config: target_pb2.TargetGenerateConfig,
    settings: TargetSettings,
    *,
    deadline_s: float | None,
) -> Ask:
    """Check a request's config.

    Raises:
        InvalidRequest: a field is out of range.
        NotFound: another model is asked for.
    """
    require_model(config.model, settings)
    check_request_id(config.request_id)
    check_sampling(config.sampling)
    check_speculation(config.speculation)
    require(config.positions in _POSITIONS, "positions", config.positions, "a known mode")
    ranges = ranges_from_proto(
        config.control_ranges,
        "config.control_ranges",
        max_count=MAX_CONTROL_RANGES,
        disjoint=True,
    )
    speculate, draft_tokens = _speculation(config.speculation, settings)
    sampling = config.sampling
    return Ask(
        request_id=config.request_id or str(uuid.uuid4()),
        max_tokens=_max_tokens(sampling, settings.gen_max),
        sampling=_sampling(sampling),
        stops=tuple(sampling.stop),
        ignore_eos=sampling.ignore_eos,
        speculate=speculate,
        draft_tokens=draft_tokens,
        positions=_POSITIONS[config.positions],
        control_ranges=tuple(ranges),
        deadline_s=deadline_s,
    )


def require_model(name: str, settings: TargetSettings) -> None:
    """Refuse another model than the one that is served; empty means that one."""
    if name and name != settings.model_name:
        raise NotFound(
            f"this target serves {settings.model_name!r}, not {name!r}",
            field="config.model",
            got=name,
            allowed=settings.model_name,
        )


def _max_tokens(message: pb.SamplingConfig, gen_max: int) -> int:
    if not message.HasField("max_tokens"):
        return min(DEFAULT_MAX_TOKENS, gen_max)
    check_whole(message, "sampling.max_tokens", 1, gen_max)
    return message.max_tokens


def _sampling(message: pb.SamplingConfig) -> Sampling:
    return Sampling(
        message.temperature,
        message.top_k,
        message.top_p if message.HasField("top_p") else 1.0,
        message.min_p,
        message.seed if message.HasField("seed") else secrets.randbits(64),
        message.logprobs if message.HasField("logprobs") else None,
    )


def _speculation(message: pb.SpeculationConfig, settings: TargetSettings) -> tuple[bool, int]:
    enabled = message.enabled if message.HasField("enabled") else settings.speculation
    stated = message.HasField("draft_tokens")
    return enabled, message.draft_tokens if stated else settings.draft_tokens


def plan_from_proto(plan: target_pb2.Plan, prompt: bytes) -> Plan:
    """Check a plan against its prompt.

    Raises:
        SpansNotCanonical: spans that are not canonical for this prompt.
        InvalidRequest: no kind, no span, or spans of another prompt.
    """
    kind = plan.WhichOneof("kind")
    if kind == "skim":
        spans = spans_from_proto(plan.skim.spans, prompt, "plan.skim.spans")
        if not spans:
            raise InvalidRequest.field_value("plan.skim.spans", "no span", "at least one span")
        return Plan(tuple(spans))
    if kind == "full":
        if not plan.full.HasField("fallback"):
            return Plan(None)
        field = "plan.full.fallback"
        fallback = spans_from_proto(plan.full.fallback, prompt, field)
        if not fallback:
            raise InvalidRequest.field_value(field, "no span", "at least one span, or unset")
        return Plan(None, tuple(fallback))
    raise InvalidRequest.field_value("plan.kind", "nothing", "skim or full")


def event_to_proto(event: Event, token_bytes: Callable[[int], bytes]) -> Response:
    """Turn an event into its message; `token_bytes` gives the bytes of a token id."""
    match event:
        case Queued(done, total):
            return Response(progress=pb.Progress(stage=pb.STAGE_QUEUE, done=done, total=total))
        case Prefilled(done, total):
            return Response(progress=pb.Progress(stage=pb.STAGE_PREFILL, done=done, total=total))
        case Started():
            return Response(started=_started(event))
        case Piece(text, tokens):
            return Response(
                tokens=pb.TokenChunk(
                    text=text,
                    token_ids=[token.token_id for token in tokens],
                    logprobs=[
                        _logprob(token, token_bytes)
                        for token in tokens
                        if token.logprob is not None
                    ],
                )
            )
        case Ended():
            return Response(finish=_finish(event))


def _started(event: Started) -> target_pb2.PrefillStarted:
    return target_pb2.PrefillStarted(
        kept_tokens=event.kept_tokens,
        positions=pb.POSITION_MODE_ORIGINAL if event.original else pb.POSITION_MODE_COMPACTED,
        degraded=event.degraded,
        queue_s=event.queue_s,
        map_s=event.map_s,
        park_s=event.park_s,
    )


def _logprob(token: AnswerToken, token_bytes: Callable[[int], bytes]) -> pb.TokenLogprob:
    def alternative(score: TokenScore) -> pb.TokenAlternative:
        return pb.TokenAlternative(
            token_id=score.token_id, token=token_bytes(score.token_id), logprob=score.logprob
        )

    return pb.TokenLogprob(
        chosen=alternative(TokenScore(token.token_id, token.logprob or 0.0)),
        top=[alternative(score) for score in token.top],
    )


def _finish(event: Ended) -> target_pb2.TargetFinish:
    return target_pb2.TargetFinish(
        reason=_END[event.reason],
        usage=pb.Usage(
            prompt_tokens=event.prompt_tokens,
            kept_tokens=event.kept_tokens,
            completion_tokens=event.completion_tokens,
            draft_tokens=event.draft_tokens,
            accepted_tokens=event.accepted_tokens,
            target_steps=event.steps,
            prompt_bytes=event.prompt_bytes,
        ),
        prefill_s=event.prefill_s,
        decode_s=event.decode_s,
        seed=event.seed,
        speculation=event.speculation,
    )
