"""The vocabulary of a GGUF file: tokens, merges, special tokens, and what each id means in bytes.

Read by `modelfile.tokenizer`. Knows byte-level BPE only (`tokenizer.ggml.model` = `gpt2`), where
every token is a string over 256 printable characters that stand for the bytes. Follows llama.cpp
in what counts as a special token, which is decided by type and, for some, by name. Refuses
(ModelFileError): other kinds of vocabulary, unknown pre-tokenizers, ids out of range, merges that
are malformed, a vocabulary without all 256 byte tokens (some texts would lose bytes).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelfile.gguf_file import GgufFile
from modelfile.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from skim.errors import ModelFileError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# Names that end a text whatever type the file gives them, as llama.cpp decides.
_END_NAMES = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <｜end▁of▁sentence｜>".split()
)
# Fill-in-the-middle separators: control tokens; the last three kinds end a text too.
_FIM_NAMES = frozenset(
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <|fim_suffix|> <fim-suffix> <fim_suffix> "
    "<|fim_middle|> <fim-middle> <fim_middle>".split()
)
_FIM_END_NAMES = frozenset(
    "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> "
    "<reponame> <|file_sep|>".split()
)


def _alphabet() -> str:
    """List the characters that stand for bytes 0 to 255 (GPT-2's printable alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return "".join(chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256))


BYTE_ALPHABET = _alphabet()
_CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_ALPHABET)}


class SpecialToken(NamedTuple):
    """A token that is found in the text as it is, before any cutting or merging.

    `control` ones count only inside control ranges; the others (user-defined) everywhere.
    """

    text: bytes
    id: int
    control: bool


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """Everything a tokenizer needs from the file.

    Attributes:
        tokens: text of each id, in the byte alphabet (special tokens: as they are).
        ids: text → id; of equal texts the last id.
        merges: pairs in order of rank, without repeats.
        pre: the pre-tokenizer, `pre_name` its name in the file.
        specials: longest text first.
        verbatim: ids whose text is its own UTF-8 bytes, not in the byte alphabet.
        control_ids: ids that carry no text for a reader.
        end_ids: ids that end a text or a turn.
        bos_id: the id that starts a text, or None; `add_bos`: whether a raw text must begin so.
        lengths: int32 [len(tokens)], bytes of text that each id stands for.
        fingerprint: sha256 in hex over all that decides which text gives which ids.
    """

    tokens: list[str]
    ids: dict[str, int]
    merges: list[tuple[str, str]]
    pre: PreTokenizer
    pre_name: str
    specials: tuple[SpecialToken, ...]
    verbatim: frozenset[int]
    control_ids: frozenset[int]
    end_ids: frozenset[int]
    eos_id: int | None
    bos_id: int | None
    add_bos: bool
    lengths: NDArray[np.int32]
    fingerprint: str

    def token_bytes(self, token: int) -> bytes:
        """Give the bytes of text that an id stands for (a special token: its own text)."""
        text = self.tokens[token]
        if token in self.verbatim:
            return text.encode()
        return bytes([_CHARACTER_TO_BYTE[character] for character in text])

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> Vocabulary:
        """Read a file's vocabulary.

        Raises:
            ModelFileError: see the module's first lines.
        """
        pre_name, pre = _pre_tokenizer(gguf)
        raw_tokens = gguf.strings("tokenizer.ggml.tokens")
        tokens = _decoded(gguf, raw_tokens.to_bytes(), "tokenizer.ggml.tokens")
        for index, text in enumerate(tokens):
            if not text:
                tokens[index] = f"[EMPTY_{index}]"
        ids = {text: index for index, text in enumerate(tokens)}
        missing = [character for character in BYTE_ALPHABET if character not in ids]
        if missing:
            raise ModelFileError(
                f"{gguf.path}: the vocabulary lacks {len(missing)} of the 256 byte tokens",
                got=f"{256 - len(missing)} byte tokens",
                allowed="256",
            )
        types = _types(gguf, tokens)
        by_type = {kind: frozenset(np.flatnonzero(types == kind).tolist()) for kind in (2, 3, 4)}
        named = {ids[name] for name in _END_NAMES | _FIM_NAMES | _FIM_END_NAMES if name in ids}
        control = by_type[_CONTROL] | by_type[_UNKNOWN] | named
        verbatim = control | by_type[_USER_DEFINED]
        specials = [
            SpecialToken(tokens[index].encode(), index, index in control) for index in verbatim
        ]
        verbatim |= _outside_alphabet(tokens, verbatim)
        lengths = np.fromiter(map(len, tokens), np.int32, len(tokens))
        for index in verbatim:
            lengths[index] = len(tokens[index].encode())
        eos, bos = _token_id(gguf, "eos", tokens), _token_id(gguf, "bos", tokens)
        ends = {ids[name] for name in _END_NAMES | _FIM_END_NAMES if name in ids}
        ends |= {
            found
            for found in (eos, _token_id(gguf, "eot", tokens), _token_id(gguf, "eom", tokens))
            if found is not None
        }
        return cls(
            tokens=tokens,
            ids=ids,
            merges=_merges(gguf),
            pre=pre,
            pre_name=pre_name,
            specials=tuple(sorted(specials, key=lambda token: (-len(token.text), token.id))),
            verbatim=verbatim,
            control_ids=control,
            end_ids=frozenset(ends),
            eos_id=eos,
            bos_id=bos,
            add_bos=bos is not None and gguf.flag("tokenizer.ggml.add_bos_token", pre.add_bos),
            lengths=lengths,
            fingerprint=_fingerprint(gguf, pre_name, types),
        )


def _pre_tokenizer(gguf: GgufFile) -> tuple[str, PreTokenizer]:
    model = gguf.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelFileError(
            f"{gguf.path}: tokenizer model {model!r} is not supported",
            reason="TOKENIZER_UNSUPPORTED",
            got=model,
            allowed="gpt2 (byte-level BPE)",
        )
    name = gguf.text("tokenizer.ggml.pre", "")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        allowed = ", ".join(sorted(filter(None, PRE_TOKENIZERS)))
        raise ModelFileError(
            f"{gguf.path}: pre-tokenizer {name!r} is not supported; supported: {allowed}",
            reason="TOKENIZER_UNSUPPORTED",
            got=name,
            allowed=allowed,
        )
    return name, pre


def _decoded(gguf: GgufFile, entries: list[bytes], key: str) -> list[str]:
    try:
        return [entry.decode() for entry in entries]
    except UnicodeDecodeError as error:
        raise ModelFileError(
            f"{gguf.path}: an entry of {key!r} is not UTF-8", got=error.object[:32]
        ) from error


def _types(gguf: GgufFile, tokens: list[str]) -> NDArray[np.int64]:
    if "tokenizer.ggml.token_type" not in gguf.metadata:
        return np.full(len(tokens), _NORMAL, np.int64)
    types = gguf.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise ModelFileError(
            f"{gguf.path}: {len(types)} token types for {len(tokens)} tokens",
            got=len(types),
            allowed=len(tokens),
        )
    return types


def _outside_alphabet(tokens: list[str], known: frozenset[int]) -> frozenset[int]:
    """Find ordinary tokens (padding, mostly) whose text is not in the byte alphabet."""
    if set("".join(tokens)) <= _CHARACTER_TO_BYTE.keys():
        return frozenset()
    return frozenset(
        index
        for index, text in enumerate(tokens)
        if index not in known and not _CHARACTER_TO_BYTE.keys() >= set(text)
    )


def _token_id(gguf: GgufFile, role: str, tokens: list[str]) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in gguf.metadata:
        return None
    token = gguf.integer(key)
    if not 0 <= token < len(tokens):
        raise ModelFileError(
            f"{gguf.path}: {key} is outside the vocabulary", got=token, allowed=f"< {len(tokens)}"
        )
    return token


def _merges(gguf: GgufFile) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    entries = _decoded(gguf, gguf.strings(key).to_bytes(), key)
    pairs = [(left, right) for left, _, right in [entry.partition(" ") for entry in entries]]
    for entry, pair in zip(entries, pairs, strict=True):
        if not (pair[0] and pair[1]):
            raise ModelFileError(
                f"{gguf.path}: an entry of {key!r} is not two texts", got=entry, allowed="'a b'"
            )
    return list(dict.fromkeys(pairs))


def _fingerprint(gguf: GgufFile, pre_name: str, types: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(b"gpt2\0" + pre_name.encode() + b"\0")
    digest.update(gguf.strings("tokenizer.ggml.tokens").raw)
    digest.update(types.tobytes())
    digest.update(gguf.strings("tokenizer.ggml.merges").raw)
    return digest.hexdigest()
