"""Where the chat template's text lies around the uploaded contents, and how offsets translate.

The caller counts bytes in its *upload* (the contents, joined); drafter and target count in the
*rendered* prompt (template pieces and contents in turn). A raw prompt is the case of one content
between two empty pieces. Pure. Refuses nothing: callers check ranges against the upload first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from skim.spans import Span, merge

# Rendered parts are joined up to this size: many short messages must not become as many sends.
JOIN_BYTES = 64 * 1024
MAX_PART_BYTES = 1 << 20


class Layout:
    """Offsets of pieces and contents in the rendered prompt.

    Args:
        pieces: template text before, between and after the contents; one more than contents.
        sizes: bytes of each content, in order.
    """

    def __init__(self, pieces: Sequence[bytes], sizes: Sequence[int]) -> None:
        self.pieces = tuple(pieces)
        self.sizes = tuple(sizes)
        self._upload_begins = [0, *accumulate(sizes)][:-1]
        self.upload_bytes = sum(sizes)
        self._piece_begins: list[int] = []
        self._rendered_begins: list[int] = []
        position = 0
        for piece, size in zip(self.pieces, [*sizes, 0], strict=True):
            self._piece_begins.append(position)
            self._rendered_begins.append(position + len(piece))
            position += len(piece) + size
        self._rendered_begins.pop()  # no content follows the last piece
        self.prompt_bytes = position

    @classmethod
    def raw(cls, size_bytes: int) -> Layout:
        """A prompt without a template."""
        return cls((b"", b""), (size_bytes,))

    def content(self, index: int) -> Span:
        """Where a message's content lies in the rendered prompt."""
        begin = self._rendered_begins[index]
        return Span(begin, begin + self.sizes[index])

    def piece(self, index: int) -> Span:
        """Where a piece of template text lies in the rendered prompt."""
        begin = self._piece_begins[index]
        return Span(begin, begin + len(self.pieces[index]))

    def control_ranges(self) -> list[Span]:
        """The template's text: what is parsed for special tokens."""
        return [span for i in range(len(self.pieces)) if (span := self.piece(i)).begin < span.end]

    def with_markers(self, message: int) -> Span:
        """A content together with the template text on both sides of it."""
        return Span(self.piece(message).begin, self.piece(message + 1).end)

    def to_rendered(self, span: Span) -> Span:
        """Translate a non-empty range of the upload; template text inside it is included."""
        first = bisect_right(self._upload_begins, span.begin) - 1
        last = bisect_left(self._upload_begins, span.end) - 1
        begin = span.begin - self._upload_begins[first] + self._rendered_begins[first]
        end = span.end - self._upload_begins[last] + self._rendered_begins[last]
        return Span(begin, end)

    def to_upload(self, spans: Iterable[Span]) -> list[Span]:
        """Translate sorted spans of the rendered prompt back, leaving template text out.

        The result is canonical when the input is: contents that touch in the upload are joined.
        """
        pieces: list[Span] = []
        for span in spans:
            index = max(0, bisect_right(self._rendered_begins, span.begin) - 1)
            while index < len(self.sizes) and self._rendered_begins[index] < span.end:
                content = self.content(index)
                shift = self._upload_begins[index] - content.begin
                begin, end = max(span.begin, content.begin), min(span.end, content.end)
                if begin < end:
                    pieces.append(Span(begin + shift, end + shift))
                index += 1
        return merge(pieces)

    def render(self, upload: bytes) -> bytes:
        """Build the rendered prompt."""
        if len(self.pieces) == 2 and not any(self.pieces):
            return upload
        parts = [self.pieces[0]]
        for begin, size, piece in zip(
            self._upload_begins, self.sizes, self.pieces[1:], strict=True
        ):
            parts += (upload[begin : begin + size], piece)
        return b"".join(parts)


class Renderer:
    """Turns uploaded parts into rendered parts as they arrive.

    Args:
        pieces: as in `Layout`.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._next_piece = 0
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def feed(self, message: int, data: bytes) -> list[bytes]:
        """Take the next bytes of a message (never an earlier one); return parts that are ready."""
        ready: list[bytes] = []
        while self._next_piece <= message:
            ready += self._push(self._pieces[self._next_piece])
            self._next_piece += 1
        return ready + self._push(data)

    def finish(self) -> list[bytes]:
        """Return what is left, up to the last piece."""
        ready: list[bytes] = []
        while self._next_piece < len(self._pieces):
            ready += self._push(self._pieces[self._next_piece])
            self._next_piece += 1
        return ready + self._flush()

    def _push(self, data: bytes) -> list[bytes]:
        ready: list[bytes] = []
        for begin in range(0, len(data), MAX_PART_BYTES):
            piece = data[begin : begin + MAX_PART_BYTES]
            if self._pending_bytes + len(piece) > MAX_PART_BYTES:
                ready += self._flush()
            self._pending.append(piece)
            self._pending_bytes += len(piece)
            if self._pending_bytes >= JOIN_BYTES:
                ready += self._flush()
        return ready

    def _flush(self) -> list[bytes]:
        if not self._pending:
            return []
        part = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
        self._pending, self._pending_bytes = [], 0
        return [part]


KEPT_ROLES = frozenset({"system", "tool"})


def protected_ranges(layout: Layout, roles: Sequence[str], asked: Sequence[Span]) -> list[Span]:
    """Collect what the drafter must never drop, in the rendered prompt.

    For chat: the template's first and last text (default instructions, the cue to answer), and
    system and tool messages with their markers. Of the last user message only the markers: its
    end is protected by `protect_tail_tokens`, and a document pasted into it is there to be skimmed.

    Args:
        layout: of this request.
        roles: one a message; empty for a raw prompt.
        asked: what the caller protects, in the upload.
    Returns:
        Sorted, disjoint, non-empty ranges.
    """
    ranges = [layout.to_rendered(span) for span in asked]
    if roles:
        ranges += [layout.piece(0), layout.piece(len(roles))]
        ranges += [layout.with_markers(i) for i, role in enumerate(roles) if role in KEPT_ROLES]
        user = last_user(roles)
        if user is not None:
            ranges += [layout.piece(user), layout.piece(user + 1)]
    return merge(ranges)


def query_range(layout: Layout, roles: Sequence[str], asked: Span | None) -> Span | None:
    """The range that asks, in the rendered prompt; None: the end of the prompt.

    Args:
        layout: of this request.
        roles: one a message; empty for a raw prompt.
        asked: the caller's own choice in the upload, if any.
    """
    if asked is not None:
        return layout.to_rendered(asked)
    user = last_user(roles)
    if user is None or layout.sizes[user] == 0:
        return None
    return layout.content(user)


def last_user(roles: Sequence[str]) -> int | None:
    """Index of the last user message."""
    return next((i for i in reversed(range(len(roles))) if roles[i] == "user"), None)
