"""How long does a service take to open a GGUF with a large vocabulary?

    python -m bench.open_vocabulary --entries 151936 --n 20 --json

Writes a file with a random byte-level BPE vocabulary of that many entries (as many merges as a real
one has), then opens it `n` times as a service does: walk the header, build the tokenizer, take the
model's digest. The file is in the page cache. A table in seconds, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer
from modelfile.vocabulary import BYTE_ALPHABET

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Token lengths in bytes: 2 to 14, about 6.8 on average, near those of vocabularies of this size.
MOST_ADDED_BYTES, SHARE_ADDED = 12, 0.4
ALLOWED_S = 1.0
STAGES = ("header", "tokenizer", "digest", "all")


def random_vocabulary(entries: int, seed: int) -> tuple[list[str], list[str]]:
    """Draw (tokens, merges): every token beyond the bytes joins two that came before it."""
    rng = random.Random(seed)
    by_length: dict[int, list[str]] = {1: list(BYTE_ALPHABET)}
    tokens, merges = list(BYTE_ALPHABET), []
    known = set(tokens)
    while len(tokens) < entries - len(SPECIALS):
        length = 2 + sum(rng.random() < SHARE_ADDED for _ in range(MOST_ADDED_BYTES))
        cut = rng.randrange(1, length)
        if cut not in by_length or length - cut not in by_length:
            continue
        left, right = rng.choice(by_length[cut]), rng.choice(by_length[length - cut])
        if left + right not in known:
            known.add(left + right)
            by_length.setdefault(length, []).append(left + right)
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    return [*tokens, *SPECIALS], merges


def write_vocabulary(path: Path, entries: int, seed: int) -> None:
    """Write a GGUF that has a vocabulary and one tensor of 64 bytes an entry."""
    tokens, merges = random_vocabulary(entries, seed)
    plain = entries - len(SPECIALS)
    writer = GGUFWriter(path, "qwen3")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * plain + [TokenType.CONTROL] * len(SPECIALS))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(entries - 1)
    values = np.random.default_rng(seed).standard_normal((entries, 16), dtype=np.float32)
    writer.add_tensor("token_embd.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_once(path: Path) -> dict[str, float]:
    """Open the file as a service does; seconds by stage."""
    marks = [time.perf_counter()]
    with GgufFile.open(path) as file:
        marks.append(time.perf_counter())
        Tokenizer.from_gguf(file)
        marks.append(time.perf_counter())
        file.model_digest  # noqa: B018 - taken when it is first asked for
        marks.append(time.perf_counter())
    spent = [end - begin for begin, end in zip(marks, marks[1:], strict=False)]
    return dict(zip(STAGES, [*spent, marks[-1] - marks[0]], strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Measure; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=151_936)
    parser.add_argument("--n", type=int, default=20, help="how often the file is opened")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="kept for uniformity: it always is")
    options = parser.parse_args(arguments)
    least = len(BYTE_ALPHABET) + len(SPECIALS)
    if options.entries < least or options.n < 1:
        parser.error(f"--entries must be at least {least} and --n at least 1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path, options.entries, options.seed)
        runs = [open_once(path) for _ in range(options.n)]
    print(f"{options.entries} entries, opened {options.n} times (seconds)")
    print(f"{'stage':10s} {'first':>7s} {'median':>7s} {'worst':>7s}")
    summary: dict[str, object] = {"bench": "open_vocabulary", **vars(options)}
    del summary["json"]
    for stage in STAGES:
        times = [run[stage] for run in runs]
        first, median, worst = times[0], statistics.median(times), max(times)
        print(f"{stage:10s} {first:7.3f} {median:7.3f} {worst:7.3f}")
        summary[f"{stage}_s"] = {"first": first, "median": median, "worst": worst}
    summary["allowed_s"] = ALLOWED_S
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
