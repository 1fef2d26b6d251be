"""Prompts of an exact length in tokens: the standard library's prose with a question below it.

For benchmarks that compare times at a stated length. The prose is read once; each seed begins
elsewhere in it, so that repeats are different prompts. Refuses lengths that hold no more than the
question.
"""

from __future__ import annotations

from modelfile.tokenizer import Tokenizer
from skim.client_wire import compose
from skim.demo_document import QUESTION, build_document

ASKED = QUESTION.format(key="quiet-harbour")
SPARE_TOKENS = 1_024  # prose beyond the longest prompt, for paragraphs are counted one by one
STRIDE = 0.618  # of the paragraphs from one seed's beginning to the next: never near the last ones
TRIES = 64


class Prompts:
    """Makes raw prompts of up to `longest` tokens."""

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        self._tokenizer = tokenizer
        self._paragraphs = build_document(longest + SPARE_TOKENS, self._count)

    def make(self, num_tokens: int, *, seed: int) -> bytes:
        """Build the prompt of exactly `num_tokens` tokens that begins where `seed` says.

        Raises:
            ValueError: the question alone is as long, or no cut gives the length.
        """
        least = self._count(_below("")) + 1
        if num_tokens < least:
            raise ValueError(f"num_tokens must be at least {least}, got {num_tokens}")
        first = int(seed * STRIDE * len(self._paragraphs)) % len(self._paragraphs)
        order = (*self._paragraphs[first:], *self._paragraphs[:first])
        prose = "\n\n".join(order).encode()
        ends = self._tokenizer.encode(prose).ends
        # Where the prose is cut its last token or two change: try the cuts near the wanted one.
        for step in range(TRIES):
            cut = num_tokens - least + (step + 1) // 2 * (-1 if step % 2 else 1)
            if not 0 <= cut < len(ends):
                continue
            try:
                prompt = _below(prose[: ends[cut]].decode())
            except UnicodeDecodeError:  # within a character
                continue
            if self._count(prompt) == num_tokens:
                return prompt.encode()
        raise ValueError(f"no prose with the question below it has {num_tokens} tokens")

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text.encode()))


def _below(prose: str) -> str:
    """The prose with the question below it."""
    prompt, _ = compose(ASKED, prose, None, chat=False)
    return prompt or ""
