"""Turn the engine's tokens into pieces of the answer: text, held stop texts, log-probabilities.

One `AnswerWriter` a request, between `engine_client` and the pipeline. Emits whole code points
only (the decoder's part) and no character of a stop text (`stop_text`'s part). No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from target_svc.messages import Tokens
from target_svc.request import AnswerToken, Piece, TokenScore
from target_svc.stop_text import Released, StopText


class Decoder(Protocol):
    """Turns token ids into text, whole code points at a time (`modelfile`'s StreamDecoder)."""

    def push(self, tokens: Iterable[int]) -> str:
        """Take tokens; return the text they completed."""
        ...

    def finish(self) -> str:
        """Return what an unfinished code point leaves, as the replacement character."""
        ...


class AnswerWriter:
    """The answer of one request so far.

    Attributes:
        num_tokens: tokens taken, the ones of a stop text included.
        stopped: a stop text ended the answer.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._held: StopText[AnswerToken] = StopText(stops)
        self.num_tokens = 0
        self.stopped = False

    def add(self, tokens: Tokens) -> Piece:
        """Take the tokens of one or more steps; what follows a stop text is not looked at."""
        text, out = "", []
        for token in _answer_tokens(tokens):
            self.num_tokens += 1
            released = self._held.push(token, self._decoder.push((token.token_id,)))
            text += released.text
            out += released.tokens
            if released.stopped:
                self.stopped = True
                break
        return Piece(text, tuple(out))

    def finish(self) -> Piece:
        """End the answer where the tokens end; nothing comes after a stop text."""
        if self.stopped:
            return Piece("", ())
        released: Released[AnswerToken] = self._held.finish(self._decoder.finish())
        self.stopped = released.stopped
        return Piece(released.text, tuple(released.tokens))


def _answer_tokens(tokens: Tokens) -> Iterator[AnswerToken]:
    """Take a message's parallel arrays apart, token by token."""
    count = len(tokens.ids)
    if not len(tokens.logprobs):
        yield from (AnswerToken(int(token_id)) for token_id in tokens.ids)
        return
    width = len(tokens.top_ids) // count
    for index in range(count):
        row = slice(index * width, (index + 1) * width)
        top = zip(tokens.top_ids[row].tolist(), tokens.top_logprobs[row].tolist(), strict=True)
        yield AnswerToken(
            int(tokens.ids[index]),
            float(tokens.logprobs[index]),
            tuple(TokenScore(token_id, logprob) for token_id, logprob in top),
        )
