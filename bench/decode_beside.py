"""How much a decode step and a drafter's pass cost each other on one GPU, with pauses and without.

    python -m bench.decode_beside --record beside.jsonl
    python -m bench.decode_beside --small --tokens 1024          # no GPU: the rows, not the times

The three services of `bench.ttft` run over its models (the shapes of Qwen3.6-27B and Qwen3-0.6B,
random weights, the drafter's attention planted) and share the GPU. First each alone: the steps of
one answer to a short prompt, without drafting; then the drafter's passes at each length. Then both:
passes back to back through the drafter's own door while an answer decodes, with the drafter's
pauses as the service has them, without, and with other stretches of work between them; for each the
drafter is started anew, the target stays. A step is the time between two tokens at the client and
counts only where it lies within a pass; a pass counts where the answer outlasted it, by the
drafter's clock, pauses included. Ratios are those of medians (and of 99th percentiles) to the same
alone. Rows that would start after the budget are left out and named. Progress goes to standard
error, each row to `--record` as it ends; a table comes last, then one line of JSON.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from bench.decode_clock import Answering, Pass, score_once, spread_ms, steps_of, steps_within
from bench.gpu_options import aligned, commit, gpu_facts, integers
from bench.prompts import Prompts
from bench.ttft import MODELS
from bench.ttft_record import Event, Record
from bench.ttft_stack import Stack, has_memory_plane, write_models
from drafter_svc.config import DrafterSettings
from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer
from skim.errors import EngineFault, SkimError
from skim.rpc import CHANNEL_OPTIONS
from skim.v1 import drafter_pb2_grpc

ANSWERED_TOKENS = 256  # of the prompt whose answer decodes
WARM_TOKENS = 16  # of an answer, before its steps count
# Of an answer beside passes: longer than they take, so that it decodes all the while. It is
# cancelled after the last pass.
LONGEST_ANSWER = 8_192
KEEP_RATIO = 0.05
PASS_TIMEOUT_S = 60.0
START_S, RESTART_S = 30.0, 8.0  # of the budget, to start the services, and the drafter anew

Pace = dict[str, float]


class Bench:
    """One run: its options, its record, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.record = Record(options.record)
        self._until_s: float = time.monotonic() + options.budget_s
        self._answered = b""
        self._prompts: dict[int, bytes] = {}

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._until_s - time.monotonic()

    def run(self) -> None:
        """Measure everything."""
        options = self.options
        self.record.add("run", **facts_of_the_run(options))
        models = write_models(options.models, small=options.small)
        with GgufFile.open(models.target) as file:
            tokenizer = Tokenizer.from_gguf(file)
        prompts = Prompts(tokenizer, max(options.tokens))
        self._answered = prompts.make(ANSWERED_TOKENS, seed=0)
        self._prompts = {tokens: prompts.make(tokens, seed=0) for tokens in options.tokens}
        if self.left_s < START_S:
            self.record.add("left_out", what="everything: the budget is spent")
            return
        shared = has_memory_plane() and gpu_facts() is not None
        if not shared:
            self.record.add("left_out", what="pauses: no GPU that the services share")
        environment = {
            "SKIM_TARGET_GEN_MAX": str(LONGEST_ANSWER),
            "SKIM_TARGET_FLUSH_S": "0",  # each token is a message of its own
            "SKIM_TARGET_CALIBRATION_S": "0",
            **options.settings,
        }
        paces = paces_of(options)
        services = Stack(
            models,
            environment,
            park_policy="auto" if shared else None,
            drafter_settings=paces[0][1],
        )
        self.record.add("starting", log_dir=services.log_dir)
        try:
            with services as stack:
                stack.density.write(options.density)
                self.record.add("stack", start_s=stack.start_s, **stack.facts(), gpu=gpu_facts())
                self.run_alone(stack)
                for number, (name, pace, lengths) in enumerate(paces):
                    self.run_pace(stack, name, pace, lengths, restart=number > 0)
                self.record.add("region", regions=stack.regions(), gpu=gpu_facts())
        except (SkimError, OSError, subprocess.SubprocessError) as error:
            self.record.add("failed", what="the services", error=str(error))

    def run_alone(self, stack: Stack) -> None:
        """Measure the steps of one answer, then passes at each length, each with the GPU alone."""
        options = self.options
        with Answering(stack.client, self._answered, options.answer_tokens, **self._limit()) as one:
            one.wait_for(options.answer_tokens, self.left_s)
        steps = steps_of(one.arrivals)[WARM_TOKENS:]
        self.record.add("step_alone", step_ms=spread_ms(steps))
        for tokens in options.tokens:
            passes = [self.score(stack, tokens) for _ in range(1 + options.repeats)][1:]
            self.record.add("pass_alone", tokens=tokens, **facts_of_passes(passes))

    def run_pace(
        self, stack: Stack, name: str, pace: Pace, lengths: Sequence[int], *, restart: bool
    ) -> None:
        """Measure both at once under one pace, at each length."""
        if restart:
            if self.left_s < 2 * RESTART_S:
                self.record.add("left_out", what=f"{name}: the budget is spent")
                return
            took_s = stack.restart_drafter(pace)
            self.record.add("restarted", pace=pace, restart_s=took_s)
        for tokens in lengths:
            label = f"{name}, {tokens:,} tokens"
            if self.left_s < 1.0 + self.options.beside_s:
                self.record.add("left_out", what=f"{label}: the budget is spent")
                continue
            try:
                passes, steps = self.run_beside(stack, tokens)
            except SkimError as error:
                self.record.add("failed", what=label, error=str(error), trouble=stack.trouble())
                continue
            facts = {"step_ms": spread_ms(steps), **facts_of_passes(passes)}
            self.record.add("beside", name=name, pace=pace, tokens=tokens, **facts)

    def run_beside(self, stack: Stack, tokens: int) -> tuple[list[Pass], list[float]]:
        """Run passes back to back while an answer decodes: those passes, the steps within them.

        Raises:
            SkimError: a pass or the answer failed.
            EngineFault: the answer ended before the first pass, or no step fitted into a pass.
        """
        self.score(stack, tokens)  # the drafter's arena and lists for this length
        passes: list[Pass] = []
        with Answering(stack.client, self._answered, LONGEST_ANSWER, **self._limit()) as answer:
            answer.wait_for(WARM_TOKENS, self.left_s)
            began_s = time.monotonic()
            while (
                len(passes) < self.options.repeats
                or time.monotonic() - began_s < self.options.beside_s
            ):
                one = self.score(stack, tokens)
                if answer.ended or self.left_s < 0.0:
                    break
                passes.append(one)
            arrivals = answer.arrivals[:]
        steps = steps_within(arrivals, passes)
        if not steps:
            raise EngineFault(f"{len(passes)} passes ended before the answer, with no step in them")
        return passes, steps

    def score(self, stack: Stack, tokens: int) -> Pass:
        """One pass, asked for at the drafter's own door."""
        with grpc.insecure_channel(stack.address("drafter"), options=CHANNEL_OPTIONS) as channel:
            stub = drafter_pb2_grpc.DrafterServiceStub(channel)
            prompt = self._prompts[tokens]
            return score_once(stub, prompt, keep_ratio=KEEP_RATIO, timeout_s=PASS_TIMEOUT_S)

    def _limit(self) -> dict[str, float]:
        return {"deadline_s": max(1.0, self.left_s) + PASS_TIMEOUT_S}


def paces_of(options: argparse.Namespace) -> list[tuple[str, Pace, list[int]]]:
    """Name, settings and lengths of each pace, the one that the service has by itself first."""

    def pace(work_ms: float, pause_ms: float) -> Pace:
        return {"pace_work_ms": work_ms, "pace_pause_ms": pause_ms}

    work_ms, pause_ms = options.work_ms, options.pause_ms
    found = [
        ("paced", pace(work_ms, pause_ms), options.tokens),
        ("unpaced", pace(work_ms, 0.0), options.tokens),
    ]
    for other_ms in options.other_work_ms:
        found.append((f"work {other_ms}", pace(other_ms, pause_ms), options.tokens[:1]))
    return found


def facts_of_the_run(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the figures must know."""
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu_facts(),
        "models": "small" if options.small else "27b and qwen3-0.6b",
        "density": options.density,
        "answered_tokens": ANSWERED_TOKENS,
        "settings": options.settings,
    }


def facts_of_passes(passes: Sequence[Pass]) -> dict[str, Any]:
    """Their lengths by the drafter's clock, and what they attended to."""
    return {
        "pass_ms": spread_ms([one.forward_s for one in passes]),
        "density": max(one.density for one in passes),
    }


def summarise(events: Sequence[Event]) -> dict[str, Any]:
    """Put the ratios to the figures of each alone; all of it is the JSON line."""

    def of(kind: str) -> list[Event]:
        return [event for event in events if event["kind"] == kind]

    step = next((event["step_ms"] for event in of("step_alone")), None)
    alone = {event["tokens"]: event["pass_ms"] for event in of("pass_alone")}
    rows = [
        {
            **{name: value for name, value in event.items() if name != "kind"},
            "step_times": event["step_ms"]["p50"] / step["p50"],
            "step_p99_times": event["step_ms"]["p99"] / step["p99"],
            "pass_times": event["pass_ms"]["p50"] / alone[event["tokens"]]["p50"],
        }
        for event in of("beside")
        if step is not None
    ]
    return {
        "bench": "decode_beside",
        "run": {name: value for name, value in of("run")[0].items() if name != "kind"},
        "step_alone_ms": step,
        "pass_alone_ms": alone,
        "rows": rows,
        "left_out": [event["what"] for event in of("left_out")],
        "failed": of("failed"),
        "stack": [*of("stack"), *of("restarted"), *of("region")],
    }


def table(summary: Mapping[str, Any]) -> str:
    """The figures for people, times in milliseconds; `x` is how many times alone."""
    head = ["tokens", "pace", "work", "pause", "step p50", "x", "p99", "x", "steps"]
    lines = [[*head, "pass p50", "x", "min", "max", "passes"]]
    if (step := summary["step_alone_ms"]) is not None:
        cells = ["-", "decode alone", "-", "-", f"{step['p50']:.2f}", "1", f"{step['p99']:.2f}"]
        lines.append([*cells, "1", str(step["n"]), *["-"] * 5])
    for tokens, spread in summary["pass_alone_ms"].items():
        lines.append([f"{tokens:,}", "pass alone", *["-"] * 7, *_pass_cells(spread, 1.0)])
    for row in summary["rows"]:
        step, pace = row["step_ms"], row["pace"]
        cells = [f"{row['tokens']:,}", row["name"]]
        cells += [f"{pace[name]:g}" for name in ("pace_work_ms", "pace_pause_ms")]
        cells += [f"{step['p50']:.2f}", f"{row['step_times']:.2f}"]
        cells += [f"{step['p99']:.2f}", f"{row['step_p99_times']:.2f}", str(step["n"])]
        lines.append([*cells, *_pass_cells(row["pass_ms"], row["pass_times"])])
    notes = [f"left out: {what}" for what in summary["left_out"]]
    notes += [f"failed: {event['what']}: {event['error']}" for event in summary["failed"]]
    return "\n".join([*aligned(lines), *notes])


def _pass_cells(spread: Mapping[str, float], times: float) -> list[str]:
    cells = [f"{spread['p50']:.1f}", f"{times:.2f}"]
    return [*cells, *(f"{spread[name]:.1f}" for name in ("min", "max")), str(spread["n"])]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode_beside",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    fields = DrafterSettings.model_fields
    work_ms, pause_ms = fields["pace_work_ms"].default, fields["pace_pause_ms"].default
    add("--tokens", type=integers, default=[131_072, 32_768], help="lengths of the passes' prompts")
    add("--density", type=float, default=0.05, help="of the planted block lists")
    add("--repeats", type=int, default=5, help="passes of each row, at least")
    add(
        "--beside-s", type=float, default=3.0, help="passes of a row beside an answer go on so long"
    )
    add("--answer-tokens", type=int, default=320, help="of the answer that decodes alone")
    add("--work-ms", type=float, default=work_ms, help="the drafter's pace_work_ms")
    add("--pause-ms", type=float, default=pause_ms, help="the drafter's pace_pause_ms")
    add("--other-work-ms", type=integers, default=[10, 20], help="at the first length only")
    add("--small", action="store_true", help="models that a CPU runs in seconds")
    add("--models", type=Path, default=MODELS, help="folder of both models; they stay there")
    add("--budget-s", type=float, default=110.0, help="no row starts that would end later")
    add("--set", dest="settings", action="append", default=[], metavar="SKIM_NAME=VALUE")
    add("--record", type=Path, help="file that gets every row as it ends")
    options = parser.parse_args(arguments)
    options.settings = dict(entry.split("=", 1) for entry in options.settings)
    if given := [n for n in (*os.environ, *options.settings) if n.startswith("SKIM_DRAFTER_PACE_")]:
        parser.error(f"{given[0]} would beat every row's own pace; say --work-ms and --pause-ms")
    if not options.tokens or options.repeats < 1 or options.answer_tokens <= 2 * WARM_TOKENS:
        parser.error(f"no length, no repeat, or at most {2 * WARM_TOKENS} tokens of the answer")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, then one JSON object."""
    bench = Bench(parse(arguments))
    bench.run()
    summary = summarise(bench.record.events)
    print(table(summary))
    print(json.dumps(summary))
    return 0 if summary["rows"] and not summary["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
