"""modelfile.chat_template: renders as the models' own libraries do, and cuts at contents."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from modelfile.chat_template import MAX_STREAMED_MESSAGES, ChatTemplate
from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer
from skim.errors import InvalidRequest, ModelFileError, PreconditionFailed
from tests.fixtures.tiny_gguf import CHAT_TEMPLATE, write_tiny_gguf

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <b> & 'c'?"},
]

# In the manner of Llama 3: BOS once, contents trimmed.
LLAMA3_STYLE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# In the manner of Qwen3: a namespace, a look backwards, a thought taken out of old answers, tools.
QWEN3_STYLE = """\
{%- if tools %}{{- '# Tools' + (tools | tojson) }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# In the manner of Gemma: no system role, so its text goes in front of the first user turn.
MERGING_STYLE = """\
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}
{%- set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
    {{- '<turn>' + message.role + '\\n' + (first if loop.first else '') + message.content }}
{%- endfor %}"""


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, LLAMA3_STYLE, QWEN3_STYLE, MERGING_STYLE])
@pytest.mark.parametrize(
    "roles", [("user",), ("system", "user"), ("system", "user", "assistant", "user")]
)
def test_pieces_and_contents_in_turn_are_the_rendered_prompt(
    source: str, roles: tuple[str, ...]
) -> None:
    template = ChatTemplate(source, bos_token="<s>")
    pieces = template.render_streamable(roles)
    assert len(pieces) == len(roles) + 1
    contents = [f"content {index}" for index in range(len(roles))]
    woven = pieces[0] + "".join(
        content + piece for content, piece in zip(contents, pieces[1:], strict=True)
    )
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    assert woven == template.render(messages)


def test_rendered_text_is_exactly_what_the_template_writes() -> None:
    assert ChatTemplate(CHAT_TEMPLATE).render(MESSAGES) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is <b> & 'c'?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(LLAMA3_STYLE, bos_token="<s>").render(
        MESSAGES[1:], add_generation_prompt=False
    ) == ("<s><|start_header_id|>user<|end_header_id|>\n\nWhat is <b> & 'c'?<|eot_id|>")


def test_variables_reach_the_template() -> None:
    template = ChatTemplate(QWEN3_STYLE)
    text = template.render(MESSAGES, variables={"enable_thinking": False})
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    text = template.render(MESSAGES, variables={"tools": [{"name": "<ü>"}]})
    assert text.startswith('# Tools[{"name": "<ü>"}]')  # no HTML escapes, no ASCII escapes


def test_tools_that_nobody_gave_are_none() -> None:
    # Templates ask `is not none` as often as they ask whether it is true.
    source = "{% if tools is not none or documents is not none %}x{% endif %}y"
    assert ChatTemplate(source).render([]) == "y"


def test_blocks_are_trimmed_as_models_expect() -> None:
    source = "{% if true %}\n    a\n    {% endif %}\nb"
    assert ChatTemplate(source).render([]) == "    a\nb"


def test_date_and_generation_marks_are_understood() -> None:
    source = "{{ strftime_now('%Y') }}{% generation %}x{% endgeneration %}"
    year = datetime.now().year
    assert ChatTemplate(source).render([]) in (f"{year}x", f"{year + 1}x")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content }}",  # drops the second
        "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",  # repeats
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",  # reorders
        "nothing at all",
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",  # reads, does not return
        "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}",
    ],
)
def test_template_that_does_not_return_each_content_once_in_order_is_refused(source: str) -> None:
    with pytest.raises(PreconditionFailed) as refused:
        ChatTemplate(source).render_streamable(("system", "user"))
    assert refused.value.reason == "TEMPLATE_NOT_STREAMABLE"


def test_the_message_that_breaks_streaming_is_named() -> None:
    source = "{{ messages[0].content }}{{ messages[2].content }}"
    with pytest.raises(PreconditionFailed, match="message 1"):
        ChatTemplate(source).render_streamable(("system", "user", "user"))


def test_what_the_template_refuses_is_the_callers_fault() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('user first!') }}{% endif %}x"
    with pytest.raises(InvalidRequest, match="user first!") as refused:
        ChatTemplate(source).render(MESSAGES)
    assert refused.value.reason == "TEMPLATE_REFUSED"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content.x }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",  # the sandbox lets nothing be changed
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_template_that_fails_is_a_failed_precondition(source: str) -> None:
    with pytest.raises(PreconditionFailed) as refused:
        ChatTemplate(source).render(MESSAGES)
    assert refused.value.reason == "TEMPLATE_FAILED"


def test_template_that_does_not_parse_is_refused_when_opened() -> None:
    with pytest.raises(ModelFileError, match="does not parse"):
        ChatTemplate("{% for %}")


def test_unknown_role_is_refused_by_its_place() -> None:
    with pytest.raises(InvalidRequest) as refused:
        ChatTemplate(CHAT_TEMPLATE).render_streamable(("user", "wizard"))
    assert refused.value.field == "messages[1].role"
    assert "assistant" in refused.value.metadata["allowed"]


def test_number_of_messages_is_bounded_by_the_private_use_area() -> None:
    template = ChatTemplate(CHAT_TEMPLATE)
    assert len(template.render_streamable(("user",) * MAX_STREAMED_MESSAGES)) == 6401
    for roles in ((), ("user",) * (MAX_STREAMED_MESSAGES + 1)):
        with pytest.raises(InvalidRequest) as refused:
            template.render_streamable(roles)
        assert refused.value.field == "messages"


def test_template_and_its_tokens_come_from_the_file(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    path = write_tiny_gguf(tmp_path / "t.gguf", layers=1, chat_template=source)
    with GgufFile.open(path) as gguf:
        template = ChatTemplate.from_gguf(gguf, Tokenizer.from_gguf(gguf))
    assert template is not None
    assert template.render_streamable(("user",)) == ("<|endoftext|>", "<|im_end|>")


def test_file_without_template_gives_none(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf", layers=1)
    with GgufFile.open(path) as gguf:
        assert ChatTemplate.from_gguf(gguf, Tokenizer.from_gguf(gguf)) is None
