"""Do kept tokens answer as well at their original positions as at compacted ones?

    python -m bench.positions --size 8192 --n 400 --keep 0.1 --json

The bundled target, relabelled as qwen3vl so that its rope allows gaps, answers the same skimmed
single-needle prompts both ways. Paired; the last line is JSON.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: workers are the parallelism

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.relabel import relabel_as_qwen3vl
from bench.retrieval import DRAFTERS, TARGET
from bench.retrieval_answers import Answerer
from bench.retrieval_cases import Cell
from bench.retrieval_scoring import Job, Variant, run_job, start_worker
from bench.stats import paired_difference, wilson


async def compare(options: argparse.Namespace, model: Path) -> tuple[list[bool], list[bool]]:
    """Answer every prompt both ways; (compacted, original), in order of the seeds."""
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    variant = Variant("specprefill", "same", options.keep)
    cell = Cell(options.size, "niah_single", question_above=False)
    compacted, original = [], []
    with ProcessPoolExecutor(
        options.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(TARGET, {"same": DRAFTERS["same"]}),
    ) as pool:
        async with Answerer(model, options.size, gpu=options.gpu, slots=1) as answerer:
            jobs = [Job(cell, options.seed * 1_000_000 + i, (variant,)) for i in range(options.n)]
            scored = [loop.run_in_executor(pool, run_job, job) for job in jobs]
            for future in scored:
                if time.monotonic() - began > options.seconds:
                    future.cancel()
                    continue
                item = await future
                compacted.append(await answerer.answer(item.case, item.spans[0]))
                original.append(await answerer.answer(item.case, item.spans[0], original=True))
    return compacted, original


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after this")
    parser.add_argument("--json", action="store_true", help="kept for uniformity: it always is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "target-qwen3vl.gguf"
        relabel_as_qwen3vl(TARGET, model)
        compacted, original = asyncio.run(compare(options, model))
    n = len(compacted)
    summary = {
        "bench": "positions",
        "size": options.size,
        "keep_ratio": options.keep,
        "n": n,
        "compacted_accuracy": sum(compacted) / max(1, n),
        "compacted_interval": wilson(sum(compacted), n),
        "original_accuracy": sum(original) / max(1, n),
        "original_interval": wilson(sum(original), n),
        "original_minus_compacted": paired_difference(compacted, original) if n else None,
    }
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
