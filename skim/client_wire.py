"""A client's values as the wire's messages, and back.

Shared by the two clients of `client`. Refuses options that do not exist, names that stand for no
value, and a request without a prompt; every range is the gateway's to check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from skim.client_types import (
    Admitted,
    Event,
    Finish,
    Message,
    Model,
    Models,
    Options,
    Plan,
    Progress,
    Text,
    Timings,
    TokenLogprob,
    Usage,
)
from skim.errors import InvalidRequest
from skim.v1 import common_pb2 as pb
from skim.v1 import gateway_pb2
from skim.v1.gateway_pb2 import GenerateRequest, GenerateResponse
from skim.wire import spans_from_proto, split_parts

PART_BYTES = 256 * 1024

_REQUEST = ("request_id", "model", "drafter", "protect_tail_tokens", "want_spans")
_SELECTION = (
    "keep_ratio",
    "coverage",
    "min_keep",
    "max_keep",
    "head_chunks",
    "tail_chunks",
    "neighbour_chunks",
)
_SCORING = ("scorer", "lookahead_tokens", "alpha", "max_density")
_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
    "logprobs",
    "ignore_eos",
)
_ROLES = {
    "system": gateway_pb2.ROLE_SYSTEM,
    "user": gateway_pb2.ROLE_USER,
    "assistant": gateway_pb2.ROLE_ASSISTANT,
    "tool": gateway_pb2.ROLE_TOOL,
}
_MODES = {
    "auto": gateway_pb2.PREFILL_MODE_AUTO,
    "full": gateway_pb2.PREFILL_MODE_FULL,
    "skim": gateway_pb2.PREFILL_MODE_SKIM,
}
_POSITIONS = {
    "auto": pb.POSITION_MODE_UNSPECIFIED,
    "compacted": pb.POSITION_MODE_COMPACTED,
    "original": pb.POSITION_MODE_ORIGINAL,
}


class Question:
    """One request, ready to be sent.

    Args:
        prompt: raw text, or None.
        messages: chat messages, or None; exactly one of the two is given.
        options: see `Options`.
    Raises:
        InvalidRequest: both or neither is given, an option is unknown, a name stands for nothing.
    """

    def __init__(
        self,
        prompt: str | bytes | None,
        messages: Sequence[Message | tuple[str, str]] | None,
        options: Options,
    ) -> None:
        if (prompt is None) == (messages is None):
            raise InvalidRequest.field_value(
                "prompt", "both or neither", "exactly one of prompt and messages"
            )
        if messages is not None and not messages:
            raise InvalidRequest.field_value("messages", "none", "at least one message")
        check_deadline(options.get("deadline_s"))
        self.config = _checked_config(options)
        self._contents: list[bytes] = []
        self._chat = messages is not None
        if prompt is not None:
            self._contents.append(_encode(prompt))
        for role, content in messages or ():
            self._contents.append(_encode(content))
            self.config.messages.add(
                role=_named(_ROLES, "role", role), size_bytes=len(self._contents[-1])
            )
        self.upload = b"".join(self._contents)

    def requests(self) -> Iterator[GenerateRequest]:
        """The messages of the stream, in order."""
        yield GenerateRequest(config=self.config)
        offset = 0
        for index, content in enumerate(self._contents):
            message = index if self._chat else None
            for part in split_parts(content, PART_BYTES, base=offset, message=message):
                yield GenerateRequest(prompt=part)
            offset += len(content)
        digest = hashlib.sha256(self.upload).digest()
        yield GenerateRequest(end=pb.PromptEnd(total_bytes=len(self.upload), sha256=digest))


def _encode(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest.field_value(
            "prompt", f"a lone surrogate at character {error.start}", "text that UTF-8 can carry"
        ) from None


def _named(names: Mapping[str, Any], field: str, got: str) -> Any:
    if got not in names:
        raise InvalidRequest.field_value(field, got, f"one of {', '.join(names)}")
    return names[got]


def check_deadline(deadline_s: float | None) -> None:
    """Refuse a deadline that has passed before the call begins."""
    if deadline_s is not None and not deadline_s > 0.0:
        raise InvalidRequest.field_value("deadline_s", deadline_s, "more than 0 seconds")


def _checked_config(options: Options) -> gateway_pb2.GenerateConfig:
    try:
        return _config(options)
    except (TypeError, ValueError) as error:  # protobuf's words for a wrong type or range
        name = _at_fault(options)
        raise InvalidRequest(f"{name}: {error}", field=name) from None


def _at_fault(options: Options) -> str:
    """Name the option that protobuf does not take."""
    for name, value in options.items():
        try:
            _config(cast(Options, {name: value}))
        except (TypeError, ValueError):
            return name
    return "options"


def _config(options: Options) -> gateway_pb2.GenerateConfig:
    left: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    left.pop("deadline_s", None)  # travels as the call's own deadline

    def take(names: Sequence[str]) -> dict[str, Any]:
        return {name: left.pop(name) for name in names if name in left}

    config = gateway_pb2.GenerateConfig(
        mode=_named(_MODES, "mode", left.pop("mode", "auto")),
        positions=_named(_POSITIONS, "positions", left.pop("positions", "auto")),
        protected=_ranges(left.pop("protected", ())),
        control_ranges=_ranges(left.pop("control_ranges", ())),
        **take(_REQUEST),
    )
    if "query" in left:
        config.query.CopyFrom(_ranges([left.pop("query")])[0])
    config.selection.CopyFrom(pb.SelectionConfig(**take(_SELECTION)))
    scoring = take(_SCORING)
    if "scorer_seed" in left:
        scoring["seed"] = left.pop("scorer_seed")
    config.scoring.CopyFrom(pb.ScoringConfig(**scoring))
    config.sampling.CopyFrom(pb.SamplingConfig(**take(_SAMPLING)))
    if "speculation" in left:
        config.speculation.enabled = left.pop("speculation")
    if "draft_tokens" in left:
        config.speculation.draft_tokens = left.pop("draft_tokens")
    if left:
        known = ", ".join(sorted(Options.__annotations__))
        raise InvalidRequest.field_value("options", ", ".join(sorted(left)), f"among {known}")
    return config


def _ranges(pairs: Sequence[tuple[int, int]]) -> list[pb.ByteRange]:
    return [pb.ByteRange(begin=begin, end=end) for begin, end in pairs]


def compose(
    question: str, document: str, system: str | None, *, chat: bool
) -> tuple[str | None, list[Message] | None]:
    """Put a question below its document: as messages where the model chats, else as raw text."""
    if chat:
        messages = [Message("system", system)] if system is not None else []
        return None, [*messages, Message("user", f"{document}\n\n{question}")]
    texts = [system] if system is not None else []
    return "\n\n".join([*texts, document, question]) + "\n", None


class Reader:
    """Turns the answers of one call into events.

    Args:
        upload: what was sent, to check the kept spans against.
        began_s: when the first byte was sent, on the monotonic clock.
    """

    def __init__(self, upload: bytes, began_s: float) -> None:
        self._upload = upload
        self._began_s = began_s
        self._first_token_s: float | None = None

    def event(self, response: GenerateResponse, at_s: float) -> Event | None:
        """Read a message that arrived at `at_s`; None: a kind this client does not know."""
        match response.WhichOneof("event"):
            case "admitted":
                admitted = response.admitted
                return Admitted(admitted.request_id, admitted.model, admitted.drafter)
            case "progress":
                progress = response.progress
                stage = _word(pb.Stage, "STAGE_", progress.stage)
                return Progress(stage, progress.done, progress.total)
            case "plan":
                return self._plan(response.plan)
            case "tokens":
                if self._first_token_s is None:
                    self._first_token_s = at_s
                return _text(response.tokens)
            case "finish":
                return self._finish(response.finish, at_s)
        return None

    def _plan(self, plan: gateway_pb2.PlanSummary) -> Plan:
        spans = None
        if plan.HasField("spans"):
            spans = tuple(spans_from_proto(plan.spans, self._upload))
        return Plan(
            skimmed=plan.skimmed,
            full_reason=_word(pb.FullReason, "FULL_REASON_", plan.full_reason),
            detail=plan.detail,
            degraded=plan.degraded,
            drafter_prompt_tokens=plan.drafter_prompt_tokens,
            drafter_kept_tokens=plan.drafter_kept_tokens,
            coverage=plan.coverage if plan.HasField("coverage") else None,
            density=plan.density,
            layer_density=tuple(plan.layer_density),
            cut_row_share=plan.cut_row_share,
            forced_only=plan.forced_only,
            yarn_factor=plan.yarn_factor,
            spans=spans,
            scorer=plan.scorer,
        )

    def _finish(self, finish: gateway_pb2.Finish, at_s: float) -> Finish:
        first_s = self._first_token_s
        return Finish(
            reason=_word(pb.FinishReason, "FINISH_REASON_", finish.reason),
            usage=Usage(**_numbers(finish.usage)),
            timings=Timings(**_numbers(finish.timings)),
            ttft_s=0.0 if first_s is None else first_s - self._began_s,
            total_s=at_s - self._began_s,
            seed=finish.seed,
            positions=_word(pb.PositionMode, "POSITION_MODE_", finish.positions),
            speculation=finish.speculation,
        )


def _word(enum: Any, prefix: str, number: int) -> str:
    """An enum's value as a word; "" for unspecified, `unknown` for a later version's value."""
    if number == 0:
        return ""
    if number not in enum.values():
        return "unknown"
    name: str = enum.Name(number)
    return name.removeprefix(prefix).lower()


def _numbers(message: Any) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def _text(chunk: pb.TokenChunk) -> Text:
    return Text(
        chunk.text,
        tuple(chunk.token_ids),
        tuple(
            TokenLogprob(
                item.chosen.token_id,
                item.chosen.token,
                item.chosen.logprob,
                tuple(TokenLogprob(top.token_id, top.token, top.logprob) for top in item.top),
            )
            for item in chunk.logprobs
        ),
    )


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes along with each call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def read_models(response: gateway_pb2.ListModelsResponse) -> Models:
    """Read the list of models."""
    return Models(
        tuple(
            Model(
                model.name,
                _word(gateway_pb2.ModelKind, "MODEL_KIND_", model.kind),
                model.serving,
                model.detail,
                model.model_digest,
                model.max_prompt_tokens,
                model.chat,
            )
            for model in response.models
        ),
        response.skim_min_tokens,
    )
