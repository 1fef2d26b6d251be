"""Turn generated token ids into text while they come, whole code points at a time.

Used by the target for one answer. A token may end inside a code point: its bytes wait for the rest.
Bytes that can never become UTF-8 show as U+FFFD; no byte is dropped silently.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from modelfile.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes one stream of ids.

    Args:
        tokenizer: of the model that generates.
        show_control: also give the text of control tokens; by default they are silent.
    """

    def __init__(self, tokenizer: Tokenizer, *, show_control: bool = False) -> None:
        self._tokenizer = tokenizer
        self._show_control = show_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Iterable[int]) -> str:
        """Add ids and give the text that is complete now, possibly none."""
        tokenizer = self._tokenizer
        raw = b"".join(
            tokenizer.token_bytes(token)
            for token in tokens
            if self._show_control or not tokenizer.is_control(token)
        )
        return self._utf8.decode(raw)

    def finish(self) -> str:
        """End the stream: what is still waiting comes as U+FFFD."""
        return self._utf8.decode(b"", final=True)
