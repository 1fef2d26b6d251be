"""Check the committed Q8_0 files against float32 exports: `python -m models.checks RUN_DIR`.

RUN_DIR holds the twins that `python -m models.export RUN_DIR --f32` writes. Bars: the same argmax
on at least 99.5 % of answer tokens, and a mean KL divergence of at most 0.02 nat on held-out text
(`--corpus`: the last 5 % of each book). Q8_0 runs as the service runs it (flash attention, f16
KV).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.ruler import RulerSpec, build_sample
from models.llama import LlamaModel
from models.shapes import MODELS_DIR, SHAPES, Qwen3Shape

PROMPT_TOKENS, TEXT_TOKENS = 2048, 512
CHAT = "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Agreement:
    """How far a Q8_0 file is from its float32 twin."""

    model: str
    answer_tokens: int
    same_argmax: float
    exact_answers: float
    kl_tokens: int
    mean_kl_nat: float


def kl_divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return mean KL(reference || other) over rows of logits, in nat."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    normalised: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return normalised


def compare(shape: Qwen3Shape, twin: Path, texts: list[str], samples: int) -> Agreement:
    """Run both files over retrieval prompts (answers forced) and over `texts`."""
    room = PROMPT_TOKENS + 64
    with (
        LlamaModel(twin, room) as full,
        LlamaModel(MODELS_DIR / shape.gguf_path.name, room) as small,
    ):
        same: list[bool] = []
        exact: list[bool] = []
        for seed in range(samples):
            prompt, answer = _retrieval(full, seed)
            wanted = len(answer)
            ids = prompt + answer[:-1]
            reference = full.logits(ids, wanted).argmax(-1)
            got = small.logits(ids, wanted).argmax(-1)
            same += (reference == got).tolist()
            exact.append(got.tolist() == answer)
        divergences = []
        for text in texts:
            ids = full.tokenise(text)[:TEXT_TOKENS]
            divergences.append(
                kl_divergence(full.logits(ids, len(ids)), small.logits(ids, len(ids)))
            )
    kl = float(np.mean(divergences)) if divergences else float("nan")
    return Agreement(
        shape.name,
        len(same),
        float(np.mean(same)),
        float(np.mean(exact)),
        len(texts) * TEXT_TOKENS,
        kl,
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
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--samples", type=int, default=100)
    options = parser.parse_args()
    texts = held_out_texts(options.corpus, 24) if options.corpus else []
    rows = []
    for shape in SHAPES.values():
        twin = options.run_dir / f"skim-{shape.name}-f32.gguf"
        if twin.is_file():
            row = compare(shape, twin, texts, options.samples)
            rows.append(row)
            print(
                f"{row.model:14s} same argmax {row.same_argmax:.4f} of {row.answer_tokens}, "
                f"exact {row.exact_answers:.3f}, KL {row.mean_kl_nat:.5f} nat"
            )
    print(json.dumps({"rows": [asdict(row) for row in rows]}))
    missed = [r for r in rows if r.same_argmax < 0.995 or r.mean_kl_nat > 0.02]
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
