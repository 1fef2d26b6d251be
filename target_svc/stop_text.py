"""Keep stop texts out of an answer, wherever its tokens happen to cut them.

Sits between the detokeniser and the stream of one request. Text that may turn out to be the start
of a stop text is held back until it is decided; tokens leave together with their text. Pure: no
clock, no I/O. The result depends on the text alone, never on how it was cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Released(Generic[T]):
    """Text that may leave, and the tokens that wrote it.

    Attributes:
        text: whole code points, possibly none.
        tokens: tokens whose text has left completely, in order.
        stopped: a stop text was met: nothing follows.
    """

    text: str = ""
    tokens: list[T] = field(default_factory=list)
    stopped: bool = False


class StopText(Generic[T]):
    """Holds text back while it could still become one of the stop texts.

    The stop text that is complete first wins; among those complete at the same character, the one
    that starts first. Its own text, and whatever follows, is dropped.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._text = ""  # decoded, not released; starts at character `_offset` of the answer
        self._offset = 0
        self._tokens: deque[tuple[T, int, int]] = deque()  # token, begin and end of its characters
        self._stopped = False

    def push(self, token: T, text: str) -> Released[T]:
        """Add one token and the text that it completed; empty while a code point is unfinished."""
        if self._stopped:
            return Released(stopped=True)
        begin = self._offset + len(self._text)
        self._tokens.append((token, begin, begin + len(text)))
        return self._add(text)

    def finish(self, text: str = "") -> Released[T]:
        """End the answer: release what is held, after adding the decoder's last text."""
        if self._stopped:
            return Released(stopped=True)
        released = self._add(text)
        if not released.stopped:
            released.text += self._text
            released.tokens += [token for token, _, _ in self._tokens]
            self._text = ""
            self._tokens.clear()
        return released

    def _add(self, text: str) -> Released[T]:
        self._text += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self._stopped = True
            _, at = min(found)
            end = self._offset + at
            # A token that wrote only a part of the text before the stop still wrote some of it.
            tokens = [token for token, begin, _ in self._tokens if begin < end]
            return Released(self._text[:at], tokens, stopped=True)
        return self._release(len(self._text) - self._held())

    def _held(self) -> int:
        """Count the characters at the end that are the start of a stop text, at most."""
        return max((_overlap(self._text, stop) for stop in self._stops), default=0)

    def _release(self, count: int) -> Released[T]:
        text, self._text = self._text[:count], self._text[count:]
        self._offset += count
        released = Released[T](text)
        while self._tokens and self._tokens[0][2] <= self._offset:
            released.tokens.append(self._tokens.popleft()[0])
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
