"""Render a model's chat template, whole or as the literal pieces around contents that are to come.

The template is `tokenizer.chat_template` of the GGUF: Jinja, run in a sandbox with what such
templates expect (block trimming, loop controls, `raise_exception`, `strftime_now`, `tojson`). For
a prompt that is still being uploaded, `render_streamable` renders it with one private-use character
in place of each content and cuts there: pieces and contents can then be streamed in turn. Refuses
templates that do not parse (ModelFileError), templates that drop, repeat or reorder contents
(PreconditionFailed, TEMPLATE_NOT_STREAMABLE), unknown roles and what a template itself refuses
(InvalidRequest).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer
from skim.errors import InvalidRequest, ModelFileError, PreconditionFailed

ROLES = ("system", "developer", "user", "assistant", "tool")
# The basic plane's private-use area, U+E000 to U+F8FF: one character a message.
FIRST_PLACEHOLDER = 0xE000
MAX_STREAMED_MESSAGES = 0xF8FF - 0xE000 + 1

Message = Mapping[str, object]


class ChatTemplate:
    """One parsed template. Rendering is pure but for `strftime_now`; safe to share.

    Args:
        source: Jinja source.
        bos_token, eos_token: texts of those tokens, empty where the model has none.
        name: how errors call the template's file.
    Raises:
        ModelFileError: the source does not parse.
    """

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", name: str = "template"
    ) -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFileError(
                f"{name}: the chat template does not parse: {error}",
                reason="TEMPLATE_INVALID",
                got=str(error),
            ) from error

    @classmethod
    def from_gguf(cls, gguf: GgufFile, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Read a file's template; None when it has none.

        Raises:
            ModelFileError: the template does not parse.
        """
        if "tokenizer.chat_template" not in gguf.metadata:
            return None
        vocabulary = tokenizer.vocabulary
        bos, eos = (
            "" if token is None else vocabulary.token_bytes(token).decode(errors="replace")
            for token in (vocabulary.bos_id, vocabulary.eos_id)
        )
        source = gguf.text("tokenizer.chat_template")
        return cls(source, bos_token=bos, eos_token=eos, name=str(gguf.path))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Render messages to the text of a prompt.

        Args:
            messages: each with `role` and `content`, and what else the template understands.
            add_generation_prompt: end with the beginning of the assistant's turn.
            variables: further variables of the template, for example `enable_thinking`.
        Raises:
            InvalidRequest: an unknown role, or the template refuses these messages.
            PreconditionFailed: the template fails (reason TEMPLATE_FAILED).
        """
        for index, message in enumerate(messages):
            if message.get("role") not in ROLES:
                raise InvalidRequest.field_value(
                    f"messages[{index}].role", message.get("role"), f"one of {', '.join(ROLES)}"
                )
        context = {"tools": None, "documents": None, **self._tokens, **(variables or {})}
        try:
            return self._template.render(
                **context, messages=messages, add_generation_prompt=add_generation_prompt
            )
        except _Refused as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {error}",
                reason="TEMPLATE_REFUSED",
                field="messages",
                got=", ".join(str(message["role"]) for message in messages),
            ) from error
        except Exception as error:  # a template may fail in any way that Python can
            raise PreconditionFailed(
                f"the chat template fails: {type(error).__name__}: {error}",
                reason="TEMPLATE_FAILED",
                field="messages",
            ) from error

    def render_streamable(
        self,
        roles: Sequence[str],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> tuple[str, ...]:
        """Render the literal text around messages whose contents are not known yet.

        Args:
            roles: role of each message, in order.
        Returns:
            len(roles) + 1 pieces: piece 0, content 0, piece 1, ... content n - 1, piece n is the
            prompt. Only the pieces may be parsed for control tokens.
        Raises:
            InvalidRequest: no message, too many for the private-use area, an unknown role, or
                the template refuses these roles.
            PreconditionFailed: TEMPLATE_NOT_STREAMABLE, when the template does not give back each
                content exactly once and in order; TEMPLATE_FAILED.
        """
        if not 1 <= len(roles) <= MAX_STREAMED_MESSAGES:
            raise InvalidRequest.field_value(
                "messages", len(roles), f"1 to {MAX_STREAMED_MESSAGES} messages"
            )
        places = [chr(FIRST_PLACEHOLDER + index) for index in range(len(roles))]
        messages = [
            {"role": role, "content": place} for role, place in zip(roles, places, strict=True)
        ]
        text = self.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables
        )
        known = frozenset(places)
        found = [character for character in text if character in known]
        if found != places:
            first = next(
                (
                    i
                    for i, pair in enumerate(zip(places, found, strict=False))
                    if len(set(pair)) > 1
                ),
                min(len(places), len(found)),
            )
            raise PreconditionFailed(
                "the chat template does not return each content exactly once and in order "
                f"(first seen at message {first}); send the prompt without messages instead",
                reason="TEMPLATE_NOT_STREAMABLE",
                field="messages",
                got=f"{len(found)} contents for {len(places)} messages",
                allowed="each content once, in order",
            )
        pieces, start = [], 0
        for place in places:
            end = text.index(place, start)
            pieces.append(text[start:end])
            start = end + 1
        return (*pieces, text[start:])


class _Refused(Exception):
    """The template called `raise_exception`."""


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message)[:500])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models have not been trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(Extension):
    """`{% generation %}`: marks what a model says, for training; here its body is the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    helpers: dict[str, Callable[..., object]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(helpers)
    environment.filters["tojson"] = _to_json
    return environment
