"""Check a caller's config before its first part is read, and answer in the wire's messages.

Every value out of range is refused by the name of its field, with what came and what is allowed,
so that no service behind sees it. What depends on a model (its context, its scorers' memory) is
refused by the service that knows.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.plan import Mode
from gateway.request import Ask
from skim.errors import InvalidRequest, PromptTooLong
from skim.request_checks import (
    MAX_CONTROL_RANGES,
    MAX_PROTECT_TAIL_TOKENS,
    check_sampling,
    check_scoring,
    check_selection,
    check_speculation,
    check_whole,
    query_range,
    require,
)
from skim.v1 import common_pb2 as pb
from skim.v1 import gateway_pb2
from skim.v1.gateway_pb2 import GenerateRequest
from skim.wire import prompt_end, ranges_from_proto, split_parts

MAX_MESSAGES = 1_024
MAX_TEXT_PROMPT_BYTES = 1 << 20
MAX_PROTECTED = 1_024
# Enough to hold a question of a few sentences.
DEFAULT_PROTECT_TAIL_TOKENS = 256
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


def ask_from_proto(config: gateway_pb2.GenerateConfig) -> Ask:
    """Check a request's config.

    Raises:
        InvalidRequest: a field is out of range, or two exclude each other.
    """
    require(config.mode in _MODES, "mode", config.mode, "a known prefill mode")
    require(
        config.positions in pb.PositionMode.values(), "positions", config.positions, "a known mode"
    )
    check_selection(config.selection)
    check_scoring(config.scoring)
    check_sampling(config.sampling)
    check_speculation(config.speculation)
    check_whole(config, "protect_tail_tokens", 0, MAX_PROTECT_TAIL_TOKENS)
    roles, sizes = _messages(config.messages)
    require(
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
        query=query_range(config.query) if config.HasField("query") else None,
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


def _messages(
    messages: Sequence[gateway_pb2.Message],
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    require(
        len(messages) <= MAX_MESSAGES, "messages", len(messages), f"at most {MAX_MESSAGES} messages"
    )
    for index, message in enumerate(messages):
        require(
            message.role in _ROLES,
            f"messages[{index}].role",
            message.role,
            "system, user, assistant or tool",
        )
    stated = bool(messages) and all(message.HasField("size_bytes") for message in messages)
    sizes = tuple(int(message.size_bytes) for message in messages) if stated else None
    return tuple(_ROLES[message.role] for message in messages), sizes


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
