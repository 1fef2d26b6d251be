"""Check the committed Q8_0 files against float32 exports: `python -m models.checks RUN_DIR`.

RUN_DIR holds the twins that `python -m models.export RUN_DIR --f32` writes. Bars: the same argmax
on at least 99.5 % of answer digits, and a mean KL divergence of at most 0.02 nat on held-out text
(`--corpus`: the last 5 % of each book). Q8_0 runs as the service runs it (flash attention, f16
KV). A sample has seven digits: with the default of 200 the 95 % interval lies above the bar when
all agree.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.ruler import RulerSpec, build_sample
from bench.stats import wilson
from models.llama import LlamaModel
from models.shapes import SHAPES, Qwen3Shape

PROMPT_TOKENS, TEXT_TOKENS = 2048, 512
CHAT = "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Agreement:
    """How far a Q8_0 file is from its float32 twin.

    Attributes:
        answer_digits: digits of all answers, each predicted after the true ones before it.
        same_digits: those on which both files have the same argmax.
        answers: samples; each ends in one end mark, which is not among the digits.
        same_ends: end marks on which both files have the same argmax.
        exact_answers: samples on which the Q8_0 file's argmax is the true answer throughout.
        kl_tokens: held-out tokens behind `mean_kl_nat`; NaN when there are none.
        seconds: wall time of it all.
    """

    model: str
    answer_digits: int
    same_digits: int
    answers: int
    same_ends: int
    exact_answers: int
    kl_tokens: int
    mean_kl_nat: float
    seconds: float

    @property
    def passes(self) -> bool:
        """Whether both bars are met; without held-out text the second is not asked."""
        return self.same_digits >= 0.995 * self.answer_digits and not self.mean_kl_nat > 0.02


def kl_divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return mean KL(reference || other) over rows of logits, in nat."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    normalised: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return normalised


def compare(
    shape: Qwen3Shape, twin: Path, texts: list[str], samples: int, threads: int
) -> Agreement:
    """Run both files over retrieval prompts (answers forced) and over `texts`."""
    room, started = PROMPT_TOKENS + 64, time.monotonic()
    digits = same_digits = same_ends = exact = 0
    with (
        LlamaModel(twin, room, threads=threads) as full,
        LlamaModel(shape.gguf_path, room, threads=threads) as small,
    ):
        for seed in range(samples):
            prompt, answer = _retrieval(full, seed)
            ids = prompt + answer[:-1]
            got = small.logits(ids, len(answer)).argmax(-1)
            same = full.logits(ids, len(answer)).argmax(-1) == got
            digits += len(answer) - 1
            same_digits += int(same[:-1].sum())
            same_ends += bool(same[-1])
            exact += got.tolist() == answer
        divergences = []
        for text in texts:
            ids = full.tokenise(text)[:TEXT_TOKENS]
            divergences.append(
                kl_divergence(full.logits(ids, len(ids)), small.logits(ids, len(ids)))
            )
    return Agreement(
        model=shape.name,
        answer_digits=digits,
        same_digits=same_digits,
        answers=samples,
        same_ends=same_ends,
        exact_answers=exact,
        kl_tokens=len(texts) * TEXT_TOKENS,
        mean_kl_nat=float(np.mean(divergences)) if divergences else float("nan"),
        seconds=time.monotonic() - started,
    )


def _retrieval(model: LlamaModel, seed: int) -> tuple[list[int], list[int]]:
    spec = RulerSpec(task="niah_multikey")
    sample = build_sample(
        spec,
        PROMPT_TOKENS,
        lambda text: len(model.tokenise(text)),
        50_000 + seed,
        reserve_tokens=16,
    )
    head, tail = CHAT.split("{content}")
    end = model.tokenise("<|im_end|>", parse_special=True)
    prompt = (
        model.tokenise(head, True) + model.tokenise(sample.content) + model.tokenise(tail, True)
    )
    return prompt, model.tokenise(sample.answers[0]) + end


def held_out_texts(corpus: Path, count: int) -> list[str]:
    """Return `count` stretches of the books' last 5 %, which training never sees."""
    texts: list[str] = []
    for path in sorted(corpus.glob("*.txt")):
        book = path.read_text()
        tail = " ".join(book[int(len(book) * 0.96) :].split())
        texts += [tail[i : i + 4000] for i in range(0, len(tail) - 4000, 4000)]
    return texts[:: max(1, len(texts) // count)][:count]


def main() -> None:
    """Check all three; the exit status is 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="where the float32 twins lie")
    parser.add_argument("--corpus", type=Path, help="books in .txt; their last 5 %% is held out")
    parser.add_argument("--only", choices=SHAPES, action="append", help="a model; default: all")
    parser.add_argument("--samples", type=int, default=200, help="retrieval prompts a model")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    options = parser.parse_args()
    texts = held_out_texts(options.corpus, 24) if options.corpus else []
    rows = []
    for shape in (SHAPES[name] for name in options.only or SHAPES):
        twin = options.run_dir / f"skim-{shape.name}-f32.gguf"
        if twin.is_file():
            row = compare(shape, twin, texts, options.samples, options.threads)
            rows.append(row)
            low, high = wilson(row.same_digits, row.answer_digits)
            print(
                f"{row.model:14s} same argmax on {row.same_digits} of {row.answer_digits} digits "
                f"[{low:.4f}, {high:.4f}] and {row.same_ends} of {row.answers} end marks, "
                f"exact {row.exact_answers} of {row.answers}, KL {row.mean_kl_nat:.5f} nat, "
                f"{row.seconds:.0f} s",
                flush=True,
            )
    print(json.dumps({"rows": [asdict(row) for row in rows]}))
    sys.exit(not all(row.passes for row in rows))


if __name__ == "__main__":
    main()
