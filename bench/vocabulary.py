"""A byte-level BPE vocabulary of a stated size that cuts text as a real one does.

For random models that whole services run: `learn` merges on the standard library's prose
(`skim.demo_document`), the prose of every benchmark's prompts, until a token is worth about 4.4
bytes, as large vocabularies give on English; the entries beyond are there and never used. Target
and drafter get the same ids for the same text. The merges differ in detail between Python versions.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

# Before the library is imported: see `modelfile.tokenizer`.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from bench.gguf_out import Value
from modelfile.pre_tokenizers import PRE_TOKENIZERS
from modelfile.vocabulary import BYTE_ALPHABET
from skim.demo_document import collect_docstrings

LEARNT = 8_192  # bytes included; more merges make the prose's tokens hardly longer
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # llama.cpp's numbers


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id (bytes, learnt, specials) and merges by rank, in the byte alphabet."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]

    def metadata(self, entries: int, pre: str) -> dict[str, Value]:
        """The tokenizer's keys of a GGUF with `entries` ids.

        Raises:
            ValueError: there are fewer entries than tokens.
        """
        known = len(self.tokens)
        if entries < known:
            raise ValueError(f"entries must be at least {known}, got {entries}")
        normal = known - len(SPECIALS)
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [*self.tokens, *(f"[{i}]" for i in range(known, entries))],
            "tokenizer.ggml.token_type": [
                *[_NORMAL] * normal,
                *[_CONTROL] * len(SPECIALS),
                *[_UNUSED] * (entries - known),
            ],
            "tokenizer.ggml.merges": list(self.merges),
            "tokenizer.ggml.eos_token_id": known - 1,
            "tokenizer.ggml.padding_token_id": normal,
            "tokenizer.ggml.add_bos_token": False,
        }


def learn(size: int = LEARNT) -> Vocabulary:
    """Learn a vocabulary of at most `size` ids and the specials; about a second."""
    pattern = tokenizers.Regex(PRE_TOKENIZERS["qwen2"].patterns[0])
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=list(BYTE_ALPHABET),
        show_progress=False,
    )
    bpe.train_from_iterator((" ".join(d.sentences) for d in collect_docstrings()), trainer)
    found = json.loads(bpe.to_str())["model"]
    tokens = sorted(found["vocab"], key=found["vocab"].__getitem__)
    return Vocabulary((*tokens, *SPECIALS), tuple(" ".join(pair) for pair in found["merges"]))
