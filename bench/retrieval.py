"""Retrieval by keep ratio: is the needle kept, and does the answer survive?

    python -m bench.retrieval --sizes 8192,16384 --tasks niah_single,niah_multikey --n 50 \
        --keep 0.05,0.1,0.2 --scorer specprefill --seed 1 --json

With `--record FILE` each prompt's outcome is appended to FILE as soon as it is known, and the
prompts already in it are not run again: a long run may be stopped and resumed.

Gold recall: share of prompts whose every asked needle (key and value) lies in kept spans. Full and
skim accuracy: the bundled target answers the same prompts whole and skimmed, greedily; leave them
out with `--no-target`. Questions share no word with the needle but the key; needles lie outside
what is kept anyway. Intervals are 95 % Wilson, the difference is paired. The last line is JSON.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: workers are the parallelism

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.retrieval_answers import Answerer
from bench.retrieval_cases import Cell
from bench.retrieval_record import Outcome, Record
from bench.retrieval_scoring import Job, Scored, Variant, run_job, start_worker
from bench.ruler import TASKS
from bench.stats import paired_difference, wilson
from drafter_svc.backend import SCORERS

MODELS = Path(__file__).resolve().parent.parent / "models"
TARGET = MODELS / "skim-target.gguf"
DRAFTERS = {"same": MODELS / "skim-drafter.gguf", "cross": MODELS / "skim-drafter-cross.gguf"}
MODEL_FREE = ("lexical", "ends", "random")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; list options take commas."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    whole = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    shares = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--sizes", type=whole, default=[8192, 16384])
    parser.add_argument("--tasks", type=words, default=["niah_single", "niah_multikey"])
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--keep", type=shares, default=[0.05, 0.1, 0.2])
    parser.add_argument("--scorer", type=words, default=["specprefill"])
    parser.add_argument("--drafter", type=words, default=["same"], help="same, cross")
    parser.add_argument("--neighbours", type=whole, default=[1])
    parser.add_argument("--last-token", type=whole, default=[1], help="1, 0 or both")
    parser.add_argument("--question", type=words, default=["below"], help="below, above")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target-n", type=int, help="answer only the first of the n prompts")
    parser.add_argument("--answer", type=words, default=["specprefill"], help="scorers to answer")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after this")
    parser.add_argument("--record", type=Path, help="append outcomes here, resume from them")
    parser.add_argument("--no-target", action="store_true", help="gold recall only")
    parser.add_argument("--no-full", action="store_true", help="skim accuracy only")
    parser.add_argument("--no-skim", action="store_true", help="full accuracy only, no drafter")
    parser.add_argument("--gpu", action="store_true", help="offload the target's layers")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="no table, only the JSON line")
    options = parser.parse_args(arguments)
    for name, given, allowed in (
        ("--tasks", options.tasks, TASKS),
        ("--scorer", options.scorer, SCORERS),
        ("--drafter", options.drafter, tuple(DRAFTERS)),
        ("--question", options.question, ("below", "above")),
    ):
        for value in given:
            if value not in allowed:
                parser.error(f"{name} must be of {', '.join(allowed)}, got {value!r}")
    return options


def variants(options: argparse.Namespace) -> tuple[Variant, ...]:
    """Every way to score and select that differs from the others."""
    if options.no_skim:
        return ()
    rows: dict[Variant, None] = {}
    for drafter, scorer, last, around, keep in itertools.product(
        options.drafter, options.scorer, options.last_token, options.neighbours, options.keep
    ):
        if scorer in MODEL_FREE and drafter != options.drafter[0]:
            continue
        if scorer != "specprefill" and last != options.last_token[0]:
            continue
        rows[Variant(scorer, drafter, keep, around, bool(last))] = None
    return tuple(rows)


def answered(options: argparse.Namespace) -> Callable[[Variant], bool]:
    """Tell which variants the target answers: the chosen scorers, otherwise plain."""
    first = (options.neighbours[0], bool(options.last_token[0]))
    return lambda variant: (
        variant.scorer in options.answer
        and (variant.neighbour_chunks, variant.last_token_query) == first
    )


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every task at every size, with the question where it was asked for."""
    return [
        Cell(size, task, where == "above")
        for where, size, task in itertools.product(options.question, options.sizes, options.tasks)
    ]


async def run(
    jobs: list[Job], options: argparse.Namespace, record: Record, progress: Progress
) -> None:
    """Score the prompts in worker processes, and answer them as they come, into the record.

    After `--seconds` no further prompt is started; the rows then say how many there were.
    """
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    limit = {job.seed for job in jobs[: options.target_n]}
    todo = [job for job in jobs if (job.cell, job.seed) not in record.outcomes]
    bar = progress.add_task("prompts", total=len(jobs), completed=len(jobs) - len(todo))
    gate = asyncio.Semaphore(options.workers + 2 * options.slots)
    drafters = {} if options.no_skim else {name: DRAFTERS[name] for name in options.drafter}

    async def one(job: Job, pool: ProcessPoolExecutor, answerer: Answerer | None) -> None:
        async with gate:
            if time.monotonic() - began > options.seconds:
                return
            item = await loop.run_in_executor(pool, run_job, job)
            full: bool | None = None
            skim: dict[int, bool] = {}
            if answerer and job.seed in limit:
                skim = await answer_skimmed(item, answerer, answered(options))
                full = None if options.no_full else await answerer.answer(item.case, None)
            record.add(Outcome(job.cell, job.seed, item.gold, item.density, full, skim))
            progress.advance(bar)

    async with contextlib.AsyncExitStack() as stack:
        answerer = None
        if not options.no_target:
            answerer = await stack.enter_async_context(
                Answerer(TARGET, max(options.sizes), gpu=options.gpu, slots=options.slots)
            )
        with ProcessPoolExecutor(
            options.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(TARGET, drafters),
        ) as pool:
            await asyncio.gather(*(one(job, pool, answerer) for job in todo))


async def answer_skimmed(
    item: Scored, answerer: Answerer, wanted: Callable[[Variant], bool]
) -> dict[int, bool]:
    """Answer one prompt once for each distinct set of kept spans, by variant index."""
    seen: dict[Any, bool] = {}
    right: dict[int, bool] = {}
    for index, (variant, spans) in enumerate(zip(item.job.variants, item.spans, strict=True)):
        if not wanted(variant):
            continue
        if spans not in seen:
            seen[spans] = await answerer.answer(item.case, spans)
        right[index] = seen[spans]
    return right


def row(
    cell: Cell,
    variant: Variant | None,
    index: int,
    outcomes: list[Outcome],
) -> dict[str, Any]:
    """One line of the table."""
    here = [item for item in outcomes if item.cell == cell]
    full = {item.seed: item.full for item in here if item.full is not None}
    skim = {item.seed: item.skim[index] for item in here if index in item.skim}
    line: dict[str, Any] = {"size": cell.size, "task": cell.name}
    if variant:
        gold = sum(item.gold[index] for item in here)
        line |= {
            "scorer": variant.scorer,
            "drafter": variant.drafter,
            "keep_ratio": variant.keep_ratio,
            "neighbour_chunks": variant.neighbour_chunks,
            "last_token_query": variant.last_token_query,
            "n": len(here),
            "gold_recall": gold / max(1, len(here)),
            "gold_interval": wilson(gold, len(here)),
            "density": sum(item.density for item in here) / max(1, len(here)),
        }
    line["answered_n"] = len(full or skim)
    for name, right in (("full", full), ("skim", skim)):
        line[f"{name}_accuracy"] = sum(right.values()) / len(right) if right else None
        line[f"{name}_interval"] = wilson(sum(right.values()), len(right)) if right else None
    if both := [seed for seed in skim if seed in full]:
        line["skim_minus_full"] = paired_difference(
            [full[seed] for seed in both], [skim[seed] for seed in both]
        )
    return line


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table for people."""
    table = Table("size", "task", "scorer", "drafter", "keep", "n", "gold recall", "full", "skim")
    for line in rows:
        interval = line.get("gold_interval")
        table.add_row(
            str(line["size"]),
            line["task"],
            line.get("scorer", "")
            + ("" if line.get("last_token_query", True) else ", no last token")
            + (f", ±{line['neighbour_chunks']}" if line.get("neighbour_chunks") else ""),
            line.get("drafter", ""),
            f"{line['keep_ratio']:g}" if "keep_ratio" in line else "",
            f"{line.get('n', '')}/{line['answered_n']}",
            f"{line['gold_recall']:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "",
            _share(line, "full"),
            _share(line, "skim"),
        )
    console.print(table)


def _share(line: dict[str, Any], name: str) -> str:
    if line[f"{name}_accuracy"] is None:
        return ""
    low, high = line[f"{name}_interval"]
    return f"{line[f'{name}_accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def main(arguments: list[str] | None = None) -> None:
    """Run the table."""
    options = parse(arguments)
    console = Console(stderr=True)
    began = time.monotonic()
    ways = variants(options)
    seeds = [options.seed * 1_000_000 + index for index in range(options.n)]
    jobs = [Job(cell, seed, ways) for seed in seeds for cell in cells(options)]
    options.target_n = None if options.target_n is None else options.target_n * len(cells(options))
    wanted = answered(options)
    setting = [[vars(way), wanted(way)] for way in ways]
    try:
        record = Record(options.record, setting, [TARGET, *DRAFTERS.values()])
    except ValueError as error:
        sys.exit(f"--record: {error}")
    with record, Progress(console=console, disable=not console.is_terminal) as progress:
        asyncio.run(run(jobs, options, record, progress))
    asked = {(job.cell, job.seed) for job in jobs}
    outcomes = [item for key, item in record.outcomes.items() if key in asked]
    rows = [
        row(cell, variant, index, outcomes)
        for cell in cells(options)
        for index, variant in enumerate(ways or (None,))
    ]
    if not options.json:
        show(rows, console)
    summary = {
        "bench": "retrieval",
        "seed": options.seed,
        "total_s": round(time.monotonic() - began, 1),
        "rows": rows,
    }
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
