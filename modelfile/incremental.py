"""Tokenise a prompt while it is still arriving, in parallel, with the tokens of one whole call.

Parts come in at any size, cut anywhere, even inside a code point. Whenever enough text is pending,
it is cut at a safe boundary (`modelfile.boundaries` proves it safe) and the piece goes to the
tokenizer's threads; `finish` puts the results together.

A cut never falls inside a special token: the few whose text contains a safe boundary are looked for
around the cut. Text without any safe boundary stays one piece.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from modelfile.boundaries import SAFE_BOUNDARY
from modelfile.tokenizer import Range, TokenizedText, Tokenizer
from skim.errors import InvalidRequest

# About 8 ms of one core's work: small enough to spread a prompt over the threads and to leave
# little to do when the last part arrives, large enough that the cost of a piece does not show.
PIECE_BYTES = 16 * 1024

# A boundary shows in at most this many bytes on each side.
_BOUNDARY_BYTES = 3

_Piece = tuple[NDArray[np.int32], NDArray[np.int32]]


class IncrementalTokenizer:
    """Collects one prompt. Not thread-safe: one caller feeds it.

    Args:
        tokenizer: shared by all prompts of a model.
        control_ranges: byte ranges of the prompt, known up front, that are parsed for control
            tokens. Instead, they may come with their parts (`feed(part, control=True)`).
    """

    def __init__(self, tokenizer: Tokenizer, control_ranges: Iterable[Range] = ()) -> None:
        self._tokenizer = tokenizer
        self._ranges: list[Range] = []
        self._known_up_front = False
        for begin, end in sorted((int(begin), int(end)) for begin, end in control_ranges):
            if not 0 <= begin <= end:
                raise InvalidRequest.field_value(
                    "control_ranges", (begin, end), "half-open byte ranges"
                )
            self._add_range(begin, end)
            self._known_up_front = True
        self._pending = bytearray()
        self._pending_offset = 0  # of the pending text in the prompt
        self._searched = 0  # pending bytes already searched for a boundary, in vain
        self._pieces: list[Future[_Piece]] = []
        self._hazards = [
            special.text
            for special in tokenizer.vocabulary.specials
            if SAFE_BOUNDARY.search(special.text)
        ]
        self._hazard_bytes = max(map(len, self._hazards), default=0)

    @property
    def size_bytes(self) -> int:
        """Bytes fed so far."""
        return self._pending_offset + len(self._pending)

    def feed(self, part: bytes, *, control: bool = False) -> None:
        """Take the next part of the prompt; returns at once, the work runs on other threads.

        Args:
            part: any bytes of the UTF-8 text, cut anywhere.
            control: the part's text is parsed for control tokens.
        """
        if control:
            if self._known_up_front:
                raise ValueError("control ranges were given up front; parts cannot add to them")
            self._add_range(self.size_bytes, self.size_bytes + len(part))
        self._pending += part
        start = 0
        while (cut := self._next_cut(start)) is not None:
            self._submit(start, cut)
            start = cut
        if start:
            del self._pending[:start]
            self._pending_offset += start
            self._searched = max(0, self._searched - start)

    def finish(self) -> TokenizedText:
        """Wait for all pieces (blocking) and put them together.

        Raises:
            InvalidRequest: the prompt is not UTF-8, or a control range ends past it.
        """
        if self._ranges and self._ranges[-1][1] > self.size_bytes:
            self.cancel()
            raise InvalidRequest.field_value(
                "control_ranges", self._ranges[-1], f"within the prompt's {self.size_bytes} bytes"
            )
        if self._pending and self._pieces:
            self._submit(0, len(self._pending))
        try:
            pieces = [piece.result() for piece in self._pieces]
        except BaseException:
            self.cancel()
            raise
        if not self._pieces:  # a short prompt is not worth a trip to another thread
            pieces = [self._tokenizer.encode_piece(*self._piece(0, len(self._pending)))]
        ids = np.concatenate([ids for ids, _ in pieces])
        lengths = np.concatenate([lengths for _, lengths in pieces])
        return TokenizedText(ids, np.cumsum(lengths, dtype=np.int64))

    def cancel(self) -> None:
        """Drop the pieces that no thread has started on."""
        for piece in self._pieces:
            piece.cancel()

    def _add_range(self, begin: int, end: int) -> None:
        """Add a range behind or into the last ones; touching ranges become one."""
        if begin == end:
            return
        if self._ranges and begin <= self._ranges[-1][1]:
            last = self._ranges[-1]
            self._ranges[-1] = (min(begin, last[0]), max(end, last[1]))
        else:
            self._ranges.append((begin, end))

    def _next_cut(self, start: int) -> int | None:
        """Find the first safe boundary at least PIECE_BYTES after `start` in the pending text."""
        search = max(start + PIECE_BYTES, self._searched)
        # Around a cut there must be enough text to see every special token that spans it.
        limit = len(self._pending) - self._hazard_bytes
        while search < limit:
            found = SAFE_BOUNDARY.search(self._pending, search - _BOUNDARY_BYTES)
            if found is None:
                search = max(search, limit - _BOUNDARY_BYTES)
                break
            if found.end() > limit:
                break
            if found.end() >= search and not self._inside_special(found.end()):
                self._searched = 0
                return found.end()
            search = max(search, found.end()) + 1
        self._searched = search
        return None

    def _inside_special(self, cut: int) -> bool:
        reach = self._hazard_bytes
        around = bytes(self._pending[max(0, cut - reach) : cut + reach])
        middle = min(cut, reach)
        for text in self._hazards:
            found = around.find(text)
            while found >= 0:
                if found < middle < found + len(text):
                    return True
                found = around.find(text, found + 1)
        return False

    def _piece(self, begin: int, end: int) -> tuple[bytes, int, list[Range]]:
        """Take pending [begin, end): its bytes, its offset in the prompt, its control ranges."""
        offset, size = self._pending_offset + begin, end - begin
        ranges: list[Range] = []
        first = max(0, bisect_right(self._ranges, (offset, 0)) - 1)
        for low, high in self._ranges[first:]:
            if low >= offset + size:
                break
            if high > offset:
                ranges.append((max(low - offset, 0), min(high - offset, size)))
        return bytes(self._pending[begin:end]), offset, ranges

    def _submit(self, begin: int, end: int) -> None:
        piece, offset, ranges = self._piece(begin, end)
        encode = self._tokenizer.encode_piece
        self._pieces.append(self._tokenizer.pool.submit(encode, piece, offset, ranges))
