"""Train the two tokenizers of the bundled models: byte-level BPE behind Qwen2's pre-tokenizer.

Run once, before training: `python -m models.training.tokenizer CORPUS_DIR`. The JSON files are
committed, since a model means nothing without the vocabulary it was trained on. Digits are single
tokens. There is no Unicode normalisation: llama.cpp does none, and byte offsets must add up.
"""

import argparse
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench import ruler
from models.shapes import CROSS, SPECIAL_TOKENS, TARGET, Qwen3Shape
from skim.demo_document import collect_docstrings

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Return a tokenizer of exactly `vocabulary` entries; the special tokens are the last ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    if tokenizer.get_vocab_size() != vocabulary:
        raise SystemExit(f"{tokenizer.get_vocab_size()} entries instead of {vocabulary}")
    return tokenizer


def load_tokenizer(shape: Qwen3Shape) -> Tokenizer:
    """Return the committed tokenizer of a model; the text of a special token stays plain text."""
    tokenizer = Tokenizer.from_file(str(shape.tokenizer_path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def main() -> None:
    """Train both: the pair's on everything, the other on the docstrings and two of the books."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="directory of .txt files")
    books = [p.read_text() for p in sorted(parser.parse_args().corpus.glob("*.txt"))]
    if not books:
        sys.exit("no .txt files there")
    docstrings = ["\n".join((d.name, *d.sentences)) for d in collect_docstrings()]
    needles = [ruler.random_needle(random.Random(seed)) for seed in range(2000)]
    TARGET.tokenizer_path.parent.mkdir(exist_ok=True)
    pair = train_tokenizer([*books, *docstrings, *needles], TARGET.vocabulary)
    pair.save(str(TARGET.tokenizer_path), pretty=False)
    cross = train_tokenizer([*docstrings, *needles[:200], *books[-2:]], CROSS.vocabulary)
    cross.save(str(CROSS.tokenizer_path), pretty=False)


if __name__ == "__main__":
    main()
