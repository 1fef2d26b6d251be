"""One upload: checks the parts as they come, and turns them into parts of the rendered prompt.

Between the caller's stream and the two legs. Where the layout is known beforehand (raw prompts,
chat with stated sizes) rendered parts come out as parts go in; otherwise all come out at the end.
Refuses gaps, overlaps, wrong totals and digests, invalid UTF-8, parts that name no message or an
earlier one, sizes other than stated, messages that cut a code point, and ranges past the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.rendering import MAX_PART_BYTES, Layout, Renderer
from gateway.request import Ask
from skim.errors import InvalidRequest
from skim.spans import Span, is_boundary
from skim.v1 import common_pb2 as pb
from skim.wire import PromptAssembler


class Upload:
    """The state of one upload.

    Args:
        ask: the request's config.
        pieces: the chat template's text around the messages; two empty ones for a raw prompt.
        max_bytes: largest upload.
        hold: called with the bytes held so far, before they are kept; may refuse.
    """

    def __init__(
        self, ask: Ask, pieces: Sequence[bytes], max_bytes: int, hold: Callable[[int], None]
    ) -> None:
        self._ask = ask
        self._pieces = pieces
        self._hold = hold
        self._assembler = PromptAssembler(max_bytes)
        self._sizes = [0] * (len(pieces) - 1)
        self._message = 0
        # The layout that the services' configs are made with; None: not known before the end.
        self.early_layout: Layout | None = None
        if not ask.roles:
            self.early_layout = Layout.raw(0)  # one content: offsets do not depend on its size
        elif ask.sizes is not None:
            check_ranges(ask, sum(ask.sizes))
            self.early_layout = Layout(pieces, ask.sizes)
        self._renderer = Renderer(pieces) if self.early_layout is not None else None
        self.layout = Layout.raw(0)  # the true one once `finish` has returned
        self._data = b""

    @property
    def size_bytes(self) -> int:
        """Bytes received so far."""
        return self._assembler.size_bytes

    def add(self, part: pb.PromptPart) -> list[bytes]:
        """Take a part; return the rendered parts that are ready.

        Raises:
            InvalidRequest: see the module.
            Busy: `hold` refused.
        """
        message = self._message_of(part)
        self._hold(self._assembler.size_bytes + len(part.data))
        data = self._assembler.add(part)
        self._message = message
        self._sizes[message] += len(data)
        return [] if self._renderer is None else self._renderer.feed(message, data)

    def finish(self, end: pb.PromptEnd) -> list[bytes]:
        """Check the whole; return the rendered parts that are left.

        Raises:
            InvalidRequest: see the module.
        """
        self._data = self._assembler.finish(end)
        self._check_messages()
        check_ranges(self._ask, len(self._data))
        self.layout = Layout(self._pieces, self._sizes)
        if self._renderer is not None:
            return self._renderer.finish()
        return self.rendered_parts()

    def rendered(self) -> bytes:
        """The rendered prompt, once `finish` has returned."""
        return self.layout.render(self._data)

    def rendered_parts(self) -> list[bytes]:
        """The rendered prompt in parts, once `finish` has returned."""
        prompt = self.rendered()
        return [
            prompt[begin : begin + MAX_PART_BYTES]
            for begin in range(0, len(prompt), MAX_PART_BYTES)
        ]

    def _message_of(self, part: pb.PromptPart) -> int:
        if not self._ask.roles:
            if part.HasField("message"):
                raise InvalidRequest.field_value(
                    "prompt.message", part.message, "unset where config.messages is empty"
                )
            return 0
        got = int(part.message) if part.HasField("message") else None
        if got is None or not self._message <= got < len(self._ask.roles):
            raise InvalidRequest.field_value(
                "prompt.message",
                got,
                f"in [{self._message}, {len(self._ask.roles)}): a message, none before the last",
            )
        return got

    def _check_messages(self) -> None:
        begin = 0
        for index, size in enumerate(self._sizes):
            if self._ask.sizes is not None and self._ask.sizes[index] != size:
                raise InvalidRequest.field_value(
                    f"config.messages[{index}].size_bytes",
                    self._ask.sizes[index],
                    f"the {size} bytes that arrived",
                )
            if not is_boundary(self._data, begin):
                raise InvalidRequest(
                    f"message {index} must be UTF-8, but it begins inside a code point",
                    field="prompt.message",
                    reason="INVALID_UTF8",
                    got=f"a cut at byte {begin}",
                    allowed="messages of whole code points",
                )
            begin += size


def check_ranges(ask: Ask, upload_bytes: int) -> None:
    """Refuse ranges that end past the upload.

    Raises:
        InvalidRequest: names the first one.
    """
    named: list[tuple[str, Span]] = [
        *((f"config.protected[{i}]", span) for i, span in enumerate(ask.protected)),
        *((f"config.control_ranges[{i}]", span) for i, span in enumerate(ask.control_ranges)),
    ]
    if ask.query is not None:
        named.append(("config.query", ask.query))
    for field, (begin, end) in named:
        if end > upload_bytes:
            raise InvalidRequest.field_value(
                field, f"[{begin}, {end})", f"inside the upload's {upload_bytes} bytes"
            )
