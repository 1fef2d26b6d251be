"""Template text around contents: what is sent, and how offsets translate there and back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.rendering import (
    JOIN_BYTES,
    MAX_PART_BYTES,
    Layout,
    Renderer,
    protected_ranges,
    query_range,
)
from skim.spans import Span, canonical, check_canonical

texts = st.text(max_size=12).map(str.encode)


@st.composite
def chats(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """Pieces and contents of a chat with at least one byte of content, multi-byte text included."""
    contents = draw(st.lists(texts, min_size=1, max_size=6).filter(any))
    pieces = draw(st.lists(texts, min_size=len(contents) + 1, max_size=len(contents) + 1))
    return pieces, contents


def interleaved(pieces: list[bytes], contents: list[bytes]) -> bytes:
    return pieces[0] + b"".join(c + p for c, p in zip(contents, pieces[1:], strict=True))


def layout_of(pieces: list[bytes], contents: list[bytes]) -> Layout:
    return Layout(pieces, [len(content) for content in contents])


@given(chats())
def test_render_interleaves_pieces_and_contents(chat: tuple[list[bytes], list[bytes]]) -> None:
    pieces, contents = chat
    layout = layout_of(pieces, contents)
    prompt = layout.render(b"".join(contents))
    assert prompt == interleaved(pieces, contents)
    assert layout.prompt_bytes == len(prompt)


@given(chats())
def test_content_and_control_ranges_name_the_bytes_they_stand_for(
    chat: tuple[list[bytes], list[bytes]],
) -> None:
    pieces, contents = chat
    layout = layout_of(pieces, contents)
    prompt = interleaved(pieces, contents)
    for index, content in enumerate(contents):
        begin, end = layout.content(index)
        assert prompt[begin:end] == content
    named = [prompt[begin:end] for begin, end in layout.control_ranges()]
    assert named == [piece for piece in pieces if piece]


@given(chats(), st.data())
def test_an_upload_range_survives_the_way_to_the_prompt_and_back(
    chat: tuple[list[bytes], list[bytes]], data: st.DataObject
) -> None:
    pieces, contents = chat
    layout, upload = layout_of(pieces, contents), b"".join(contents)
    begin = data.draw(st.integers(0, len(upload) - 1))
    end = data.draw(st.integers(begin + 1, len(upload)))
    rendered = layout.to_rendered(Span(begin, end))
    prompt = interleaved(pieces, contents)
    # The range begins and ends at the very bytes it names, template text only inside it.
    assert prompt[rendered.begin] == upload[begin]
    assert prompt[rendered.end - 1] == upload[end - 1]
    assert layout.to_upload([rendered]) == [Span(begin, end)]


@given(chats(), st.data())
def test_kept_spans_come_back_as_the_kept_bytes_of_the_contents(
    chat: tuple[list[bytes], list[bytes]], data: st.DataObject
) -> None:
    pieces, contents = chat
    layout, upload = layout_of(pieces, contents), b"".join(contents)
    prompt = interleaved(pieces, contents)
    ends = st.integers(0, len(prompt))
    spans = canonical(
        [Span(*sorted(pair)) for pair in data.draw(st.lists(st.tuples(ends, ends)))], prompt
    )
    kept = {at for begin, end in spans for at in range(begin, end)}
    expected = {
        layout.to_upload([Span(at, at + 1)])[0].begin
        for index in range(len(contents))
        for at in range(*layout.content(index))
        if at in kept
    }
    back = layout.to_upload(spans)
    check_canonical(back, upload)
    assert {at for begin, end in back for at in range(begin, end)} == expected


def test_template_text_alone_comes_back_as_nothing() -> None:
    layout = Layout([b"<u>", b"</u>"], [4])
    assert layout.to_upload([Span(0, 3), Span(7, 9)]) == []


def test_spans_that_touch_across_messages_come_back_as_one() -> None:
    layout = Layout([b"<", b"|", b">"], [4, 4])
    assert layout.to_upload([Span(3, 5), Span(6, 8)]) == [Span(2, 6)]


@given(chats(), st.integers(1, 5))
def test_a_renderer_sends_the_prompt_in_order_however_the_contents_are_cut(
    chat: tuple[list[bytes], list[bytes]], cut_bytes: int
) -> None:
    pieces, contents = chat
    renderer = Renderer(pieces)
    sent: list[bytes] = []
    for message, content in enumerate(contents):
        for begin in range(0, len(content), cut_bytes):
            sent += renderer.feed(message, content[begin : begin + cut_bytes])
    sent += renderer.finish()
    assert b"".join(sent) == interleaved(pieces, contents)
    assert all(sent)


def test_a_renderer_joins_small_parts_and_passes_large_ones_on() -> None:
    renderer = Renderer([b"", b""])
    assert renderer.feed(0, b"x" * (JOIN_BYTES - 1)) == []
    assert [len(part) for part in renderer.feed(0, b"y")] == [JOIN_BYTES]
    assert [len(part) for part in renderer.feed(0, b"z" * MAX_PART_BYTES)] == [MAX_PART_BYTES]
    assert renderer.finish() == []


def test_a_renderer_never_exceeds_the_largest_part() -> None:
    renderer = Renderer([b"p" * (2 * MAX_PART_BYTES + 1), b""])
    sent = renderer.feed(0, b"x" * MAX_PART_BYTES) + renderer.finish()
    assert max(len(part) for part in sent) <= MAX_PART_BYTES
    assert sum(len(part) for part in sent) == 3 * MAX_PART_BYTES + 1


ROLES = ("system", "user", "assistant", "tool", "user")
CHAT = Layout([b"<s>", b"<u>", b"<a>", b"<t>", b"<u>", b"<cue>"], [10, 20, 30, 40, 50])


def test_system_and_tool_messages_are_protected_with_their_markers() -> None:
    ranges = protected_ranges(CHAT, ROLES, [])
    assert CHAT.with_markers(0) in ranges
    # The tool's closing marker opens the last user turn, whose markers are protected too.
    assert CHAT.with_markers(3) in ranges


def test_of_the_last_user_message_only_the_markers_are_protected() -> None:
    ranges = protected_ranges(CHAT, ROLES, [])
    content = CHAT.content(4)
    assert not any(span.begin < content.end and content.begin < span.end for span in ranges)
    assert CHAT.piece(5) in ranges


def test_the_templates_first_and_last_text_are_protected_whoever_speaks_there() -> None:
    roles = ("user", "assistant", "user", "assistant")
    layout = Layout([b"<default instructions>", b"1", b"2", b"3", b"<cue>"], [10, 20, 30, 40])
    ranges = protected_ranges(layout, roles, [])
    assert layout.piece(0) in ranges
    assert layout.piece(4) in ranges
    # Between the first turns nothing is protected: piece 1 may go with its neighbours.
    assert not any(span.begin <= layout.piece(1).begin < span.end for span in ranges)


def test_earlier_user_and_assistant_turns_are_not_protected() -> None:
    ranges = protected_ranges(CHAT, ROLES, [])
    for index in (1, 2):
        content = CHAT.content(index)
        assert not any(span.begin < content.end and content.begin < span.end for span in ranges)


def test_what_the_caller_protects_is_translated() -> None:
    assert Span(18, 20) in protected_ranges(CHAT, ROLES, [Span(12, 14)])
    assert protected_ranges(Layout.raw(0), (), [Span(1, 5), Span(3, 9)]) == [Span(1, 9)]


def test_the_query_is_the_last_user_message() -> None:
    assert query_range(CHAT, ROLES, None) == CHAT.content(4)


def test_the_caller_may_name_another_query() -> None:
    assert query_range(CHAT, ROLES, Span(0, 10)) == CHAT.content(0)
    assert query_range(Layout.raw(0), (), Span(2, 4)) == Span(2, 4)


def test_without_a_user_message_the_end_of_the_prompt_asks() -> None:
    assert query_range(Layout([b"<s>", b"<cue>"], [5]), ("system",), None) is None
    assert query_range(Layout([b"<u>", b"<cue>"], [0]), ("user",), None) is None
    assert query_range(Layout.raw(0), (), None) is None
