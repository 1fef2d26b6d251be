"""Check a caller's config before its first part is read, and answer in the wire's messages.

Every value out of range is refused by the name of its field, with what came and what is allowed,
so that no service behind sees it. What depends on a model (its context, its scorers' memory) is
refused by the service that knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from google.protobuf.message import Message

from gateway.plan import Mode
from gateway.request import Ask
from skim.errors import InvalidRequest, PromptTooLong
from skim.spans import Span
from skim.v1 import common_pb2 as pb
from skim.v1 import gateway_pb2
from skim.v1.gateway_pb2 import GenerateRequest
from skim.wire import prompt_end, ranges_from_proto, split_parts

MAX_MESSAGES = 1_024
MAX_TEXT_PROMPT_BYTES = 1 << 20
MAX_PROTECTED = 1_024
MAX_CONTROL_RANGES = 16_384
MAX_PROTECT_TAIL_TOKENS = 65_536
# Enough to hold a question of a few sentences.
DEFAULT_PROTECT_TAIL_TOKENS = 256
SCORERS = ("specprefill", "mid_layer", "lexical", "ends", "random")
DEFAULT_MIN_KEEP, DEFAULT_MAX_KEEP = 0.02, 0.3

_ROLES = {
    gateway_pb2.ROLE_SYSTEM: "system",
    gateway_pb2.ROLE_USER: "user",
    gateway_pb2.ROLE_ASSISTANT: "assistant",
    gateway_pb2.ROLE_TOOL: "tool",
}
_MODES = {
    gateway_pb2.PREFILL_MODE_UNSPECIFIED: Mode.AUTO,
    gateway_pb2.PREFILL_MODE_AUTO: Mode.AUTO,
    gateway_pb2.PREFILL_MODE_FULL: Mode.FULL,
    gateway_pb2.PREFILL_MODE_SKIM: Mode.SKIM,
}


def _require(ok: bool, field: str, got: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequest.field_value(f"config.{field}", got, allowed)


def ask_from_proto(config: gateway_pb2.GenerateConfig) -> Ask:
    """Check a request's config.

    Raises:
        InvalidRequest: a field is out of range, or two exclude each other.
    """
    _require(config.mode in _MODES, "mode", config.mode, "a known prefill mode")
    _require(
        config.positions in pb.PositionMode.values(), "positions", config.positions, "a known mode"
    )
    _check_selection(config.selection)
    _check_scoring(config.scoring)
    _check_sampling(config.sampling)
    _number(config.speculation, "speculation.draft_tokens", 1, 7)
    _number(config, "protect_tail_tokens", 0, MAX_PROTECT_TAIL_TOKENS)
    roles, sizes = _messages(config.messages)
    _require(
        not (roles and config.control_ranges),
        "control_ranges",
        f"{len(config.control_ranges)} ranges",
        "empty with messages: the chat template sets its own",
    )
    tail = config.protect_tail_tokens
    return Ask(
        model=config.model,
        drafter=config.drafter,
        mode=_MODES[config.mode],
        roles=roles,
        sizes=sizes,
        protected=tuple(
            ranges_from_proto(config.protected, "config.protected", max_count=MAX_PROTECTED)
        ),
        query=_query(config),
        control_ranges=tuple(
            ranges_from_proto(
                config.control_ranges,
                "config.control_ranges",
                max_count=MAX_CONTROL_RANGES,
                disjoint=True,
            )
        ),
        protect_tail_tokens=(
            tail if config.HasField("protect_tail_tokens") else DEFAULT_PROTECT_TAIL_TOKENS
        ),
        want_spans=config.want_spans,
        selection=config.selection,
        scoring=config.scoring,
        sampling=config.sampling,
        speculation=config.speculation,
        positions=config.positions,
    )


def _query(config: gateway_pb2.GenerateConfig) -> Span | None:
    if not config.HasField("query"):
        return None
    begin, end = config.query.begin, config.query.end
    _require(begin < end, "query", f"[{begin}, {end})", "a range with begin < end")
    return Span(begin, end)


def _messages(
    messages: Sequence[gateway_pb2.Message],
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    _require(
        len(messages) <= MAX_MESSAGES, "messages", len(messages), f"at most {MAX_MESSAGES} messages"
    )
    for index, message in enumerate(messages):
        _require(
            message.role in _ROLES,
            f"messages[{index}].role",
            message.role,
            "system, user, assistant or tool",
        )
    stated = bool(messages) and all(message.HasField("size_bytes") for message in messages)
    sizes = tuple(int(message.size_bytes) for message in messages) if stated else None
    return tuple(_ROLES[message.role] for message in messages), sizes


def _shown(value: float) -> float:
    """A float32 as the caller wrote it: 0.1 rather than 0.10000000149."""
    return float(f"{value:.7g}") if math.isfinite(value) else value


def _value(message: Message, path: str) -> float | None:
    """The value of the optional field that `path` ends in, or None."""
    name = path.rsplit(".", 1)[-1]
    return getattr(message, name) if message.HasField(name) else None


def _number(message: Message, path: str, least: int, most: int | None = None) -> None:
    value = _value(message, path)
    if value is not None:
        allowed = f"at least {least}" if most is None else f"in [{least}, {most}]"
        _require(value >= least and (most is None or value <= most), path, value, allowed)


def _fraction(message: Message, path: str, *, zero: bool) -> None:
    value = _value(message, path)
    if value is not None:
        # Written so that NaN, which compares false to everything, is refused.
        ok = (0.0 <= value if zero else 0.0 < value) and value <= 1.0
        _require(ok, path, _shown(value), "in [0, 1]" if zero else "in (0, 1]")


def _check_selection(selection: pb.SelectionConfig) -> None:
    for name in ("keep_ratio", "coverage", "min_keep", "max_keep"):
        _fraction(selection, f"selection.{name}", zero=False)
    _require(
        not (selection.HasField("keep_ratio") and selection.HasField("coverage")),
        "selection.coverage",
        _shown(selection.coverage),
        "unset where keep_ratio is set: they exclude each other",
    )
    least = selection.min_keep if selection.HasField("min_keep") else DEFAULT_MIN_KEEP
    most = selection.max_keep if selection.HasField("max_keep") else DEFAULT_MAX_KEEP
    _require(
        least <= most,
        "selection.min_keep",
        _shown(least),
        f"at most selection.max_keep, {_shown(most)}",
    )
    _number(selection, "selection.head_chunks", 0, 1_024)
    _number(selection, "selection.tail_chunks", 0, 1_024)
    _number(selection, "selection.neighbour_chunks", 0, 64)


def _check_scoring(scoring: pb.ScoringConfig) -> None:
    if scoring.HasField("scorer"):
        allowed = f"one of {', '.join(SCORERS)}"
        _require(scoring.scorer in SCORERS, "scoring.scorer", scoring.scorer[:64], allowed)
    _number(scoring, "scoring.lookahead_tokens", 0, 32)
    _fraction(scoring, "scoring.alpha", zero=True)
    _fraction(scoring, "scoring.max_density", zero=False)


def _check_sampling(sampling: pb.SamplingConfig) -> None:
    _number(sampling, "sampling.max_tokens", 1)
    temperature = sampling.temperature
    _require(
        0.0 <= temperature <= 100.0, "sampling.temperature", _shown(temperature), "in [0, 100]"
    )
    _fraction(sampling, "sampling.top_p", zero=False)
    _fraction(sampling, "sampling.min_p", zero=True)
    _number(sampling, "sampling.logprobs", 0, 20)
    _require(len(sampling.stop) <= 16, "sampling.stop", len(sampling.stop), "at most 16 texts")
    for index, stop in enumerate(sampling.stop):
        size = len(stop.encode())
        _require(1 <= size <= 256, f"sampling.stop[{index}]", f"{size} bytes", "1 to 256 bytes")


def text_messages(request: gateway_pb2.GenerateTextRequest) -> list[GenerateRequest]:
    """Write a unary request as the stream that it stands for.

    Raises:
        InvalidRequest: not exactly one of prompt and chat, or too long for one message.
    """
    if request.config.messages:
        raise InvalidRequest.field_value(
            "config.messages", len(request.config.messages), "empty: use chat"
        )
    if bool(request.prompt) == bool(request.chat):
        raise InvalidRequest.field_value(
            "prompt", "both or neither", "exactly one of prompt and chat"
        )
    if len(request.chat) > MAX_MESSAGES:
        raise InvalidRequest.field_value(
            "chat", len(request.chat), f"at most {MAX_MESSAGES} messages"
        )
    config = gateway_pb2.GenerateConfig()
    config.CopyFrom(request.config)
    contents = [message.content.encode() for message in request.chat] or [request.prompt.encode()]
    whole = b"".join(contents)
    if len(whole) > MAX_TEXT_PROMPT_BYTES:
        raise PromptTooLong(
            f"GenerateText takes at most {MAX_TEXT_PROMPT_BYTES} bytes; use Generate",
            field="prompt",
            metadata={"limit": str(MAX_TEXT_PROMPT_BYTES), "got": str(len(whole))},
        )
    messages, offset = [], 0
    for index, content in enumerate(contents):
        if request.chat:
            config.messages.add(role=request.chat[index].role, size_bytes=len(content))
        for part in split_parts(content, base=offset, message=index if request.chat else None):
            messages.append(GenerateRequest(prompt=part))
        offset += len(content)
    end = GenerateRequest(end=prompt_end(whole))
    return [GenerateRequest(config=config), *messages, end]
