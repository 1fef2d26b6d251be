"""Time to the first token through all three services, stage by stage, against plain llama.cpp.

    python -m bench.ttft --tokens 131072,65536 --record a.jsonl --json
    python -m bench.ttft --small --tokens 1024,2048 --json         # the same on a CPU, in a minute
    python -m bench.ttft --summarise a.jsonl b.jsonl               # the rows of earlier runs

Gateway, drafter and target run as processes of their own; the clock starts with the client's first
byte and stops with its first token. Target and drafter are random weights in the shapes of
Qwen3.6-27B and Qwen3-0.6B with a real tokenizer (`bench.random_target`, `bench.random_model`), so
the drafter's attention is *planted* at a stated density (`bench.planted_drafter`), or *natural*,
where `max_density` bounds the work: a ratio holds for a drafter whose attention is that sparse.
Each repeat is another prompt. Plain llama.cpp (`bench.vanilla`) gets the same prompts' ids in the
same run, before the services start, with the whole device to itself.

Modes: *resident*, the device as it is; *park*, with `--leave-gib` free (`bench.ballast` holds the
rest) and the drafter's weights off the device but while it scores; *unshared* stands for resident
where the drafter holds its own weights, by `--no-memory-plane` or because the plane did not work.
The first of `--lists` gets every keep ratio, the others the first alone, *park* the first of both.
Rows that would start after the budget are left out and named. Progress goes to standard error, each
sample to `--record` as it ends; the table comes last, and with `--json` one line.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu_options import commit, densities, gpu_facts, integers
from bench.prompts import Prompts
from bench.ttft_record import Record, label, read_records, stages_of, summarise, table
from bench.ttft_stack import Ballast, Models, Stack, has_memory_plane, write_models
from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer
from skim.client_types import Answer, Options
from skim.errors import EngineFault, SkimError

MODES = ("resident", "park")
MODELS = Path("/dev/shm/skim-bench")
WARM_SEED = 1_000  # seeds of repeats count from 0
# A drafter that compiles its kernels at the first pass must not become a full prefill.
SCORE_TIMEOUT_S = 120
# A drafter that fails becomes a full prefill, which is no sample: it is not waited for.
SAMPLE_TIMEOUT_S = {"skim": 40.0, "full": 240.0}
FAILED_ROWS_MAX = 2  # in a row; services that fail so often are not asked again
PARK_RESERVE_S = 100.0  # of the budget, for the last mode: a start of the services, its rows
VANILLA_SHARE = 0.5  # of the budget, at most


class Bench:
    """One run: its options, its record, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.record = Record(options.record)
        self._began_s = time.monotonic()
        self._longest_s: dict[tuple[str, int], float] = {}  # by path and length

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return float(self.options.budget_s - (time.monotonic() - self._began_s))

    def run(self) -> None:
        """Measure everything."""
        options = self.options
        self.record.add("run", **facts_of_the_run(options))
        models = write_models(options.models, small=options.small)
        self.record.add(
            "models",
            target_bytes=models.target.stat().st_size,
            drafter_bytes=models.drafter.stat().st_size,
            target_s=models.target_s,
            drafter_s=models.drafter_s,
        )
        with GgufFile.open(models.target) as file:
            tokenizer = Tokenizer.from_gguf(file)
        prompts = Prompts(tokenizer, max(options.tokens))
        if options.vanilla_repeats:
            self.run_vanilla(models, prompts, tokenizer)
        for mode in options.modes:
            reserve_s = 0.0 if mode == options.modes[-1] else PARK_RESERVE_S
            try:
                self.run_mode(mode, models, prompts, reserve_s)
            except (SkimError, OSError, subprocess.SubprocessError) as error:
                self.record.add("failed", what=mode, error=str(error))
        self.record.add("end", total_s=time.monotonic() - self._began_s)

    def run_vanilla(self, models: Models, prompts: Prompts, tokenizer: Tokenizer) -> None:
        """Plain llama.cpp at every length, in a process of its own that is gone afterwards."""
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            ids = Path(folder) / "ids.npz"
            arrays = {str(n): tokenizer.encode(prompts.make(n, seed=0)).ids for n in options.tokens}
            np.savez(ids, allow_pickle=False, **arrays)
            command = [sys.executable, "-m", "bench.vanilla", str(models.target)]
            command += ["--tokens", ",".join(map(str, options.tokens)), "--ids", str(ids)]
            command += ["--repeats", ",".join(map(str, options.vanilla_repeats))]
            command += ["--kv-type", options.kv_type, "--ubatch", str(options.ubatch)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                limit_s = min(self.left_s, VANILLA_SHARE * options.budget_s)
                timer = threading.Timer(limit_s, child.kill)
                timer.start()
                for line in child.stdout or ():
                    event = json.loads(line)
                    self.record.add(event.pop("kind"), **event)
                timer.cancel()
            if child.returncode:
                self.record.add("left_out", what=f"llama.cpp after status {child.returncode}")

    def run_mode(self, mode: str, models: Models, prompts: Prompts, reserve_s: float) -> None:
        """Measure every row of a mode; without the memory plane, should it not come up."""
        shared = has_memory_plane() and gpu_facts() is not None
        if self.left_s <= reserve_s:
            self.record.add("left_out", what=f"all of {mode}: the budget is spent")
            return
        if mode == "park" and not shared:
            self.record.add("left_out", what=f"all of {mode}: no GPU that services could share")
            return
        policies: list[str | None] = ["always"]
        if mode == "resident":
            policies = ["auto", None] if shared and self.options.memory_plane else [None]
        leave_gib = self.options.leave_gib if mode == "park" else 0.0
        with Ballast(leave_gib) if leave_gib else nullcontext() as ballast:
            if ballast is not None:
                self.record.add("ballast", **ballast.report)
            for policy in policies:
                name = mode if policy is not None or not shared else "unshared"
                try:
                    self.run_services(name, policy, models, prompts, reserve_s)
                    break
                except SkimError as error:
                    self.record.add("failed", what=f"the services of {name}", error=str(error))

    def run_services(
        self, mode: str, policy: str | None, models: Models, prompts: Prompts, reserve_s: float
    ) -> None:
        """Start the services and measure every row of a mode.

        Raises:
            SkimError: they did not start, or failed row after row.
        """
        environment = {
            "SKIM_TARGET_KV_TYPE": self.options.kv_type,
            "SKIM_TARGET_BATCH": str(self.options.ubatch),
            "SKIM_GATEWAY_SCORE_TIMEOUT_S": str(SCORE_TIMEOUT_S),
            **self.options.settings,
        }
        services = Stack(models, environment, park_policy=policy)
        self.record.add("starting", mode=mode, park_policy=policy, log_dir=services.log_dir)
        with services as stack:
            facts = stack.facts()
            self.record.add("stack", mode=mode, start_s=stack.start_s, **facts, gpu=gpu_facts())
            failed_rows = 0
            for row in self.rows(mode, facts["drafter_backend"]):
                done = self.run_row(stack, prompts, row, reserve_s)
                failed_rows = 0 if done else failed_rows + 1
                if failed_rows == FAILED_ROWS_MAX:
                    raise EngineFault(f"{failed_rows} rows failed one after the other")
            self.record.add("region", mode=mode, regions=stack.regions(), gpu=gpu_facts())

    def rows(self, mode: str, drafter_backend: str) -> Iterator[dict[str, Any]]:
        """What is measured in a mode, the most wanted first."""
        options = self.options
        for number, density in enumerate(options.lists):
            if density is not None and drafter_backend != "cuda":
                self.record.add("left_out", what=f"planted {density}: the drafter runs on the CPU")
                continue
            lists = "natural" if density is None else f"planted {density}"
            keeps = options.keeps if number == 0 and mode != "park" else options.keeps[:1]
            for tokens in options.tokens if number == 0 or mode != "park" else ():
                for keep in keeps:
                    way = {"mode": mode, "path": "skim", "lists": lists, "keep": keep}
                    yield {**way, "tokens": tokens, "density_asked": density}
        for tokens in options.tokens if mode != "park" else ():
            if tokens <= options.full_up_to:
                way = {"mode": mode, "path": "full", "lists": "", "keep": None}
                yield {**way, "tokens": tokens, "density_asked": None}

    def run_row(
        self, stack: Stack, prompts: Prompts, row: dict[str, Any], reserve_s: float
    ) -> bool:
        """Warm one row up, then measure its repeats; a failure ends the row, and gives False."""
        stack.density.write(row["density_asked"])
        options = self.options
        repeats = options.repeats if row["path"] == "skim" else options.full_repeats
        for seed in (WARM_SEED, *range(repeats)):
            expected_s = self._longest_s.get((row["path"], row["tokens"]), 0.0)
            if self.left_s - reserve_s < expected_s + 1.0:
                begun = "all" if seed == WARM_SEED else f"from repeat {seed} on"
                self.record.add("left_out", what=f"{label(row)}: {begun}")
                return True
            prompt = prompts.make(row["tokens"], seed=seed)
            begin_s = time.monotonic()
            try:
                event = self.sample(stack, prompt, row)
            except (SkimError, ValueError) as error:
                trouble = stack.trouble()
                self.record.add("failed", what=label(row), error=str(error), trouble=trouble)
                return False
            self._longest_s[row["path"], row["tokens"]] = time.monotonic() - begin_s
            kind = "warm_up" if seed == WARM_SEED else "sample"
            self.record.add(kind, seed=seed, **row, **event)
        return True

    def sample(self, stack: Stack, prompt: bytes, row: dict[str, Any]) -> dict[str, Any]:
        """One request.

        Raises:
            SkimError: it was refused or failed.
            ValueError: it was not answered the way that was asked for.
        """
        wanted: Options = {
            "request_id": f"ttft-{uuid.uuid4().hex[:12]}",
            "mode": row["path"],
            "max_tokens": self.options.answer_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "deadline_s": SAMPLE_TIMEOUT_S[row["path"]],
        }
        if row["keep"] is not None:
            wanted["keep_ratio"] = row["keep"]
        answer = stack.client.generate(prompt, **wanted)
        check_answer(answer, row)
        scored = stack.scored(answer.admitted.request_id) if row["path"] == "skim" else None
        plan, finish = answer.plan, answer.finish
        return {
            "ttft_s": finish.ttft_s,
            "stages_s": stages_of(answer, scored),
            "target_tokenise_s": finish.timings.tokenise_s,
            "gateway_ttft_s": finish.timings.ttft_s,
            "decode_s": finish.timings.decode_s,
            "kept_tokens": finish.usage.kept_tokens,
            "prompt_bytes": finish.usage.prompt_bytes,
            "drafter_kept_tokens": plan.drafter_kept_tokens,
            "density": plan.density,
            "cut_row_share": plan.cut_row_share,
            "forced_only": plan.forced_only,
            "positions": finish.positions,
            "generation": [region["generation"] for region in stack.regions()],
        }


def check_answer(answer: Answer, row: dict[str, Any]) -> None:
    """Refuse (ValueError) an answer that came about in another way than the row says."""
    plan, usage = answer.plan, answer.finish.usage
    if usage.prompt_tokens != row["tokens"]:
        raise ValueError(f"the target counts {usage.prompt_tokens} tokens, not {row['tokens']}")
    if plan.skimmed != (row["path"] == "skim") or plan.degraded:
        raise ValueError(f"not {row['path']}: {plan.full_reason or 'degraded'} {plan.detail}")


def facts_of_the_run(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the figures must know."""
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "gpu": gpu_facts(),
        "models": "small" if options.small else "27b and qwen3-0.6b",
        "kv_type": options.kv_type,
        "ubatch": options.ubatch,
        "leave_gib": options.leave_gib,
        "settings": options.settings,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ttft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=integers, default=[131_072, 65_536], help="lengths of the prompts")
    add("--keeps", type=_ratios, default=[0.05, 0.02, 0.1], help="keep ratios")
    add(
        "--lists",
        type=densities("natural"),
        help="densities and `natural`; default 0.05,0.1,natural, with --small natural",
    )
    add("--modes", type=_modes, default=["resident"], help="of resident,park")
    add("--repeats", type=int, default=5, help="samples of each row, after one that warms it up")
    add("--vanilla-repeats", type=integers, default=[2], help="one number, or one a length; or 0")
    add("--full-up-to", type=int, default=32_768, help="longest full prefill by the services")
    add("--full-repeats", type=int, default=2, help="samples of each of those")
    add("--leave-gib", type=float, default=24.0, help="free in mode park; 0: no ballast")
    add("--no-memory-plane", dest="memory_plane", action="store_false", help="in mode resident")
    add("--kv-type", choices=["f16", "q8_0", "q4_0"], default="f16")
    add("--ubatch", type=int, default=2_048)
    add("--answer-tokens", type=int, default=8)
    add("--small", action="store_true", help="models that a CPU runs in seconds")
    add("--models", type=Path, default=MODELS, help="folder of both models; they stay there")
    add("--budget-s", type=float, default=540.0, help="no sample starts that would end later")
    add("--set", dest="settings", action="append", default=[], metavar="SKIM_NAME=VALUE")
    add("--record", type=Path, help="file that gets every sample as it ends")
    add("--summarise", type=Path, nargs="+", metavar="RECORD", help="measure nothing")
    add("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    options.settings = dict(entry.split("=", 1) for entry in options.settings)
    if options.lists is None:
        options.lists = [None] if options.small else [0.05, 0.1, None]
    if options.vanilla_repeats == [0]:
        options.vanilla_repeats = []
    if not options.tokens or not options.keeps or not options.lists or options.repeats < 1:
        parser.error("--tokens, --keeps, --lists and --repeats must not be empty")
    return options


def _ratios(text: str) -> list[float]:
    return [float(word) for word in text.split(",") if word]


def _modes(text: str) -> list[str]:
    modes = [word for word in text.split(",") if word]
    if unknown := set(modes) - set(MODES):
        raise argparse.ArgumentTypeError(f"unknown: {sorted(unknown)}; known: {list(MODES)}")
    return modes


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or read back, print the table, then one JSON object."""
    options = parse(arguments)
    if options.summarise:
        events = read_records(options.summarise)
    else:
        bench = Bench(options)
        bench.run()
        events = bench.record.events
    summary = summarise(events)
    print(table(summary))
    if options.json:
        print(json.dumps(summary))
    return 0 if summary["rows"] and not summary["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
