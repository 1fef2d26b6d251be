"""Filler for the training samples: sentences tokenised once, cut into contiguous runs of ids.

Three styles of joining, as prompts join text: sentences by a space, sentences by a newline, and
docstring paragraphs with a heading. The last 5 % of each book is held out for the checks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bench.wordings import NOISE
from skim.demo_document import collect_docstrings, split_sentences

Ids = NDArray[np.uint16]
HELD_OUT = 0.05


@dataclass(frozen=True)
class Style:
    """How pieces of a document join: put around each piece of text before it is tokenised."""

    before: str
    after: str


SPACED, LINES, PARAGRAPHS = Style(" ", ""), Style("", "\n"), Style("", "\n\n")


@dataclass(frozen=True)
class Pool:
    """A long run of ids and the offsets at which a unit (sentence, paragraph) starts."""

    style: Style
    ids: Ids
    starts: NDArray[np.int64]

    def run(self, rng: random.Random, tokens: int) -> tuple[Ids, NDArray[np.int64]]:
        """Return `tokens` ids from a random unit on, and the unit starts in them (and the end)."""
        unit = rng.randrange(len(self.starts))
        begin = int(self.starts[unit])
        ids = self.ids[begin : begin + tokens]
        while len(ids) < tokens:
            ids = np.concatenate((ids, self.ids[: tokens - len(ids)]))
        low, high = np.searchsorted(self.starts, (begin, begin + tokens))
        return ids, np.append(self.starts[low:high] - begin, tokens)

    def chunk(self, rng: random.Random, tokens: int) -> Ids:
        """Return `tokens` ids from anywhere, mid-word or not."""
        begin = rng.randrange(max(1, len(self.ids) - tokens))
        return self.ids[begin : begin + tokens]


def book_sentences(corpus: Path, held_out: bool) -> list[str]:
    """Return the sentences of all books: the first 95 % of each, or the rest."""
    sentences: list[str] = []
    for path in sorted(corpus.glob("*.txt")):
        parts = split_sentences(path.read_text())
        cut = int(len(parts) * (1 - HELD_OUT))
        sentences += parts[cut:] if held_out else parts[:cut]
    if not sentences:
        raise SystemExit(f"no text in {corpus}")
    return sentences


def build_pool(tokenizer: Tokenizer, texts: Sequence[str], style: Style) -> Pool:
    """Tokenise every text with the style's joint around it."""
    encoded = tokenizer.encode_batch([f"{style.before}{t}{style.after}" for t in texts])
    arrays = [np.array(e.ids, np.uint16) for e in encoded]
    starts = np.cumsum([0, *(len(a) for a in arrays[:-1])])
    return Pool(style, np.concatenate(arrays), starts)


@dataclass(frozen=True)
class Pools:
    """Everything fillers are drawn from."""

    books: tuple[Pool, ...]
    docstrings: tuple[Pool, ...]
    noise: tuple[Pool, ...]
    words: tuple[str, ...]
    tails: tuple[str, ...]


def build_pools(tokenizer: Tokenizer, corpus: Path) -> Pools:
    """Read and tokenise all filler (about 10 s on one core)."""
    sentences = book_sentences(corpus, held_out=False)
    docstrings = collect_docstrings()
    doc_sentences = [s for d in docstrings for s in d.sentences]
    paragraphs = [f"{d.name}\n" + " ".join(d.sentences) for d in docstrings]
    noise = list(NOISE) * 2000
    words = sorted(
        {w.lower() for s in sentences for w in s.split() if w.isalpha() and 2 < len(w) < 10}
    )
    return Pools(
        tuple(build_pool(tokenizer, sentences, style) for style in (SPACED, LINES)),
        (
            build_pool(tokenizer, doc_sentences, SPACED),
            build_pool(tokenizer, doc_sentences, LINES),
            build_pool(tokenizer, paragraphs, PARAGRAPHS),
        ),
        tuple(build_pool(tokenizer, noise, style) for style in (SPACED, LINES)),
        tuple(words),
        tuple(s for s in [*sentences[::7], *doc_sentences[::3]] if len(s) < 160),
    )
