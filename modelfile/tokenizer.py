"""Text to token ids with byte offsets, and back, exactly as llama.cpp does it.

Drafter and target both tokenise with this, from the GGUF they serve. The merging is done by the
Rust `tokenizers` library; this module finds special tokens, counts bytes (the library's offsets
count characters), and keeps the text of special tokens plain text outside control ranges, so that a
document that contains `<|im_end|>` cannot end a turn.

The rules, equal to llama.cpp's: control tokens are found only inside control ranges, user-defined
ones everywhere, longest first; what lies between them is cut by the pre-tokenizer and merged. No
normalisation of any kind. Refuses text that is not UTF-8 and control ranges outside the text.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The library's own threads stay out of it: pieces run on our pool, and a process that has used
# them warns at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
from tokenizers import models, pre_tokenizers

from modelfile.gguf_file import GgufFile
from modelfile.vocabulary import SpecialToken, Vocabulary
from modelfile.word_memo import WordMemo
from skim.errors import EngineFault, InvalidRequest, ModelFileError

Range = tuple[int, int]

_MAX_THREADS = 4


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Keep the cycle collector from walking 150,000 tokens and as many merges while they grow.

    A quarter of the time that a large vocabulary takes; nothing here makes a cycle.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """Token ids of a text and where each ends.

    Attributes:
        ids: int32 [n].
        ends: int64 [n], bytes from the start of the text; token i covers [ends[i - 1], ends[i]).
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer:
    """The tokenizer of one model. Safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._memo = WordMemo(_build(vocabulary), vocabulary.lengths)
        self._byte_cache: dict[int, bytes] = {}

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> Tokenizer:
        """Build the tokenizer of a file (ModelFileError: a vocabulary we cannot use)."""
        try:
            with _without_collecting():
                return cls(Vocabulary.from_gguf(gguf))
        except _MergeError as error:
            raise ModelFileError(
                f"{gguf.path}: the merges do not fit the vocabulary: {error}", got=str(error)
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.vocabulary.tokens)

    @property
    def fingerprint(self) -> str:
        """sha256 in hex over all that decides which text gives which ids."""
        return self.vocabulary.fingerprint

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text or a turn."""
        return self.vocabulary.end_ids

    @property
    def bos_id(self) -> int | None:
        """The id that starts a text. `encode` never adds it: it stands for no byte of the text."""
        return self.vocabulary.bos_id

    @property
    def add_bos(self) -> bool:
        """Whether a raw prompt must begin with `bos_id` (a template writes its own)."""
        return self.vocabulary.add_bos

    def is_control(self, token: int) -> bool:
        """Tell whether an id carries no text for a reader."""
        return token in self.vocabulary.control_ids

    def token_bytes(self, token: int) -> bytes:
        """Give the bytes that an id stands for (a special token: its own text).

        Raises:
            IndexError: no such id.
        """
        found = self._byte_cache.get(token)
        if found is None:
            if not 0 <= token < self.vocab_size:
                raise IndexError(f"token id must be in [0, {self.vocab_size}), got {token}")
            found = self._byte_cache[token] = self.vocabulary.token_bytes(token)
        return found

    def encode(self, text: bytes, control_ranges: Iterable[Range] = ()) -> TokenizedText:
        """Tokenise a whole text, long ones on several threads.

        Args:
            text: UTF-8.
            control_ranges: byte ranges [begin, end) whose text is parsed for control tokens.
        Raises:
            InvalidRequest: the text is not UTF-8 (`metadata["offset"]` says where), or a range
                does not lie in it.
        """
        from modelfile.incremental import IncrementalTokenizer

        incremental = IncrementalTokenizer(self, control_ranges)
        incremental.feed(text)
        return incremental.finish()

    def encode_piece(
        self, piece: bytes, offset: int, control: Sequence[Range]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokenise one piece on the calling thread.

        Args:
            piece: UTF-8; `offset` is where it starts in the prompt (for the error's sake).
            control: sorted, disjoint ranges of the piece that are parsed for control tokens.
        Returns:
            ids int32 [n] and their lengths in bytes int32 [n].
        Raises:
            InvalidRequest: the piece is not UTF-8.
        """
        fragments = self._split_specials(piece, control)
        try:
            texts = [piece[begin:end].decode() for begin, end, token in fragments if token < 0]
        except UnicodeDecodeError:
            raise _not_utf8(piece, offset) from None
        encoded = map(self._memo.encode, texts)
        raw = b"".join(
            next(encoded) if token < 0 else token.to_bytes(4, sys.byteorder)
            for _, _, token in fragments
        )
        array = np.frombuffer(raw, np.int32)
        lengths = self.vocabulary.lengths[array]
        if int(lengths.sum()) != len(piece):
            raise EngineFault(
                f"{len(piece)} bytes of text came back as {int(lengths.sum())} bytes of tokens"
            )
        return array, lengths

    def _split_specials(self, piece: bytes, control: Sequence[Range]) -> list[tuple[int, int, int]]:
        """Cut a piece at its special tokens: (begin, end, id), id -1 for text between them."""
        fragments = [(0, len(piece), -1)] if piece else []
        control_text = b"\0".join(piece[begin:end] for begin, end in control)
        for special in self.vocabulary.specials:
            if special.text in (control_text if special.control else piece):
                fragments = [
                    part
                    for fragment in fragments
                    for part in _cut(piece, fragment, special, control)
                ]
        return fragments

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """The threads that tokenise pieces; the library lets go of the interpreter's lock."""
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        return ThreadPoolExecutor(threads, thread_name_prefix="tokenize")


def _cut(
    piece: bytes, fragment: tuple[int, int, int], special: SpecialToken, control: Sequence[Range]
) -> list[tuple[int, int, int]]:
    """Cut one fragment at every occurrence of one special token."""
    begin, end, token = fragment
    if token >= 0:
        return [fragment]
    parts: list[tuple[int, int, int]] = []
    search = begin
    while (found := piece.find(special.text, search, end)) >= 0:
        stop = found + len(special.text)
        if special.control and not any(low <= found and stop <= high for low, high in control):
            search = found + 1
            continue
        if found > begin:
            parts.append((begin, found, -1))
        parts.append((found, stop, special.id))
        begin = search = stop
    if begin < end:
        parts.append((begin, end, -1))
    return parts


class _MergeError(Exception):
    """The library refused the merges."""


def _build(vocabulary: Vocabulary) -> Any:
    try:
        bpe = models.BPE(
            vocabulary.ids,
            vocabulary.merges,
            ignore_merges=vocabulary.pre.ignore_merges,
            cache_capacity=0,  # WordMemo remembers instead, above all the work
        )
    except Exception as error:  # the library raises bare Exception
        raise _MergeError(str(error)) from error
    built = tokenizers.Tokenizer(bpe)
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
                for pattern in vocabulary.pre.patterns
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return built


def _not_utf8(piece: bytes, offset: int) -> InvalidRequest:
    # Decoded again as a whole: a fragment's error does not know where the fragment began.
    try:
        piece.decode()
    except UnicodeDecodeError as error:
        offset += error.start
    return InvalidRequest(
        f"the prompt must be UTF-8; the byte at offset {offset} is not",
        reason="INVALID_UTF8",
        field="prompt",
        allowed="UTF-8",
        metadata={"offset": str(offset)},
    )
