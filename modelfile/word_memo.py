"""Encode text word by word, and remember the tokens of each word.

Under `modelfile.tokenizer`. The library spends most of its time on bookkeeping per character and
per call, and text repeats itself: of 85,000 words of a novel's 500 KB, 20,000 differ. Words end at
safe boundaries (`modelfile.boundaries`), so their tokens are those of the whole text. Unknown words
are encoded together: most may be joined (each begins with a space after an ASCII character) and
cut apart again by their bytes.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelfile.boundaries import WORDS
from skim.errors import EngineFault

# About 20 MB. When full, it starts anew: the next texts fill it with their own words.
_MAX_WORDS = 100_000
# Longer ones (tables, base64, text without spaces) do not come twice.
_MAX_CHARACTERS = 64
_JOINABLE = re.compile(r" .*[!-~]", re.DOTALL)


class WordMemo:
    """Encodes with a `tokenizers.Tokenizer`. Safe to share between threads.

    Args:
        bpe: the library's tokenizer.
        lengths: int32 [vocabulary], bytes of each id.
    """

    def __init__(self, bpe: Any, lengths: NDArray[np.int32]) -> None:
        self._bpe = bpe
        self._lengths = lengths
        # word → its ids as raw int32. Words are only ever added, so that a thread may go on with
        # a full memo while another puts a new one in its place.
        self._memo: dict[str, bytes] = {}

    def encode(self, text: str) -> bytes:
        """Encode a text without special tokens: its ids as raw int32."""
        if len(self._memo) > _MAX_WORDS:
            self._memo = {}
        memo = self._memo
        words = WORDS.findall(text)
        unknown = [word for word in dict.fromkeys(words) if word not in memo]
        if not unknown:
            return b"".join(map(memo.__getitem__, words))
        fresh = self._encode_words(unknown)
        memo.update((word, ids) for word, ids in fresh.items() if len(word) <= _MAX_CHARACTERS)
        return b"".join(fresh[word] if word in fresh else memo[word] for word in words)

    def _encode_words(self, words: list[str]) -> dict[str, bytes]:
        joinable = [word for word in words if _JOINABLE.fullmatch(word)]
        others = [word for word in words if not _JOINABLE.fullmatch(word)]
        texts = [*others, "".join(joinable)]
        encodings = self._bpe.encode_batch_fast(texts, add_special_tokens=False)
        fresh = {
            word: np.array(encoding.ids, np.int32).tobytes()
            for word, encoding in zip(others, encodings, strict=False)
        }
        ids = np.array(encodings[-1].ids, np.int32)
        ends = np.cumsum(self._lengths[ids], dtype=np.int64)
        word_ends = np.cumsum([len(word.encode()) for word in joinable], dtype=np.int64)
        stops = np.searchsorted(ends, word_ends, side="right")
        if not np.array_equal(ends[stops - 1], word_ends):
            raise EngineFault("a token spans two words that were joined for encoding")
        start = 0
        for word, stop in zip(joinable, stops.tolist(), strict=True):
            fresh[word] = ids[start:stop].tobytes()
            start = stop
        return fresh
