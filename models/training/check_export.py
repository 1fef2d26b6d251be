"""Compare a float32 export in llama.cpp with the PyTorch model of the same checkpoint.

`python -m models.training.check_export RUN_DIR` after `python -m models.export RUN_DIR --f32`;
needs torch and llama-cpp-python. Flash attention off, float32 KV, 512 tokens: logits within 0.05.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch

from bench.ruler import RulerSpec, build_sample
from models.checkpoint import load_checkpoint
from models.llama import LlamaModel
from models.shapes import SHAPES
from models.training.model import Qwen3
from models.training.tokenizer import load_tokenizer

TOKENS, TOLERANCE = 512, 0.05


def largest_difference(checkpoint: Path, exported: Path) -> float:
    """Return max |PyTorch - llama.cpp| over all logits of 512 tokens of a retrieval prompt."""
    shape, arrays, _ = load_checkpoint(checkpoint)
    tokenizer = load_tokenizer(shape)
    sample = build_sample(
        RulerSpec(keys=4),
        TOKENS,
        lambda text: len(tokenizer.encode(text).ids),
        random.Random(5).randrange(99),
    )
    ids = tokenizer.encode(sample.prompt).ids[:TOKENS]
    model = Qwen3(shape, torch.float32)
    model.load_arrays(arrays)
    with torch.no_grad():
        ours = model.logits(model(torch.tensor([ids]))[0]).numpy()
    with LlamaModel(exported, TOKENS, exact=True) as llama:
        theirs = llama.logits(ids, len(ids))
    return float(np.abs(ours - theirs).max())


def main() -> None:
    """Check every exported model; the exit status is 1 when one is out of tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args().run_dir
    torch.set_num_threads(1)
    worst = 0.0
    for name in SHAPES:
        exported = run_dir / f"skim-{name}-f32.gguf"
        if exported.is_file():
            difference = largest_difference(run_dir / f"{name}.npz", exported)
            worst = max(worst, difference)
            print(f"{name}: largest difference {difference:.5f} (allowed {TOLERANCE})")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
