"""`python -m target_svc.doctor [PATH...]`: does llama.cpp load here, and does it run these models?

Prints one JSON object a line: first the library, then one report for each target file, which is
really opened, timed, and asked for a few tokens. Run by people and by `skim doctor` as a child
process. Refuses nothing: what is wrong becomes a line of its report, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skim.errors import EngineFault, SkimError
from skim.log import configure
from target_svc.config import TargetSettings
from target_svc.pipeline import CALIBRATION_TOKENS, Job
from target_svc.request import Ask, Ended, Plan
from target_svc.target import Target, TargetModel

LIBRARY_TIMEOUT_S = 60.0
SAMPLE = b"The keeper wrote the weather and the ships into the same journal again."
SAMPLE_TOKENS = 8


def examine() -> dict[str, Any]:
    """Say whether llama.cpp loads, from a child process.

    Returns:
        package, ok, lines (sentences for people), and when it loads: version, gpu.
    """
    command = [sys.executable, "-m", "target_svc.llama.doctor"]
    report: dict[str, Any] = {"package": "target_svc", "ok": False}
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=LIBRARY_TIMEOUT_S, check=False
        )
        found = json.loads(child.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {**report, "lines": [f"llama.cpp did not load within {LIBRARY_TIMEOUT_S:g} s"]}
    except (ValueError, IndexError):
        ended = f"loading llama.cpp ended the process with status {child.returncode}"
        return {**report, "lines": [ended]}
    if not found["ok"]:
        return {**report, "lines": [found["error"]]}
    device = "can use a GPU" if found["gpu"] else "runs on the CPU"
    return {**report, **found, "lines": [f"llama-cpp-python {found['version']} {device}"]}


async def examine_model(path: str) -> dict[str, Any]:
    """Open a target, time its prefill, let it answer. Never raises for what it finds.

    Returns:
        package, path, ok, lines, and when it works: architecture, load_s, kv_bytes_per_cell,
        cells, full_max_tokens, original_positions, prefill_tokens_per_s, decode_tokens_per_s.
    """
    report: dict[str, Any] = {"package": "target_svc", "path": path, "ok": False}
    try:
        settings = TargetSettings.load(overrides={"model": Path(path)})
        target = Target(settings, TargetModel(settings.model))
        try:
            await target.start()
            found = await _measure(target)
        finally:
            await target.close()
    except SkimError as error:
        return {**report, "lines": [error.message]}
    return {**report, "ok": True, **found}


async def _measure(target: Target) -> dict[str, Any]:
    pipeline = target.require_pipeline()
    tokeniser = target.tokeniser()
    tokeniser.feed(SAMPLE)
    tokens = await tokeniser.finish()
    ask = Ask("doctor", SAMPLE_TOKENS, ignore_eos=True)
    job = Job(ask, tokens, len(SAMPLE), target.decoder())
    ended = [event async for event in pipeline.answer(job, Plan(None)) if isinstance(event, Ended)]
    if not ended or ended[0].completion_tokens != SAMPLE_TOKENS:
        raise EngineFault("the model's answer to a sample text ended early")
    facts, full_max = pipeline.facts, pipeline.router.full_max_tokens
    length = min(CALIBRATION_TOKENS[-1], full_max)
    rate = target.rate.tokens_per_s(length)
    megabytes = facts.cells * facts.kv_bytes_per_cell / 1e6
    return {
        "lines": [
            f"prefills {rate:,.0f} tokens/s at {length:,} tokens",
            f"working context: {facts.cells:,} cells, {megabytes:,.0f} MB",
            f"a full prefill fits up to {full_max:,} tokens",
        ],
        "architecture": facts.architecture,
        "load_s": round(facts.load_s + facts.warm_s, 3),
        "kv_bytes_per_cell": facts.kv_bytes_per_cell,
        "cells": facts.cells,
        "full_max_tokens": full_max,
        "original_positions": facts.allows_gaps,
        "prefill_tokens_per_s": round(rate),
        "decode_tokens_per_s": round((SAMPLE_TOKENS - 1) / max(ended[0].decode_s, 1e-6)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the reports; 0 when nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m target_svc.doctor", description=__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="GGUF files of targets")
    paths = parser.parse_args(arguments).paths
    configure("doctor", "error")
    reports = [examine()]
    print(json.dumps(reports[0]), flush=True)
    for path in paths if reports[0]["ok"] else ():
        reports.append(asyncio.run(examine_model(path)))
        print(json.dumps(reports[-1]), flush=True)
    return 0 if all(report["ok"] for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
