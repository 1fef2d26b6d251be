"""`python -m drafter_svc.doctor [PATH...]`: where passes run here, and how fast a model skims.

Prints one JSON object a line: first the backend that `auto` would choose, then one report for each
drafter file, measured by skimming a text. Run by people and by `skim doctor` as a child process.
Refuses nothing: what is wrong becomes a line of its report, and the exit status is 1.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the service has it: see `__main__`
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafter_svc.backend import SCORERS
from drafter_svc.config import DrafterSettings
from drafter_svc.drafter import open_drafter
from drafter_svc.pipeline import Ask, skim, tokenise
from kernels.doctor import examine as examine_kernels
from skim.errors import SkimError
from skim.spans import check_canonical

# About 4,000 tokens: long enough to be representative, a second of work for a small drafter.
_SENTENCE = "Paragraph {}: the keeper wrote the weather and the ships into the same journal again. "
SAMPLE = "".join(_SENTENCE.format(number) for number in range(200)).encode()


def examine() -> dict[str, Any]:
    """Say where passes run.

    Returns:
        package, ok, backend, cores, devices, scorers, lines (sentences for people).
    """
    cores = len(os.sched_getaffinity(0))
    kernels = examine_kernels()
    devices, backend = kernels["devices"], kernels["backend"]
    if backend == "cuda":
        lines = [f"passes run on the GPU, {devices[0]['name']}"]
    else:
        lines = [f"passes run on the CPU, on {cores} cores"]  # the kernels' doctor says why
    return {
        "package": "drafter_svc",
        "ok": True,
        "backend": backend,
        "cores": cores,
        "devices": devices,
        "scorers": list(SCORERS),
        "lines": lines,
    }


def examine_model(path: str) -> dict[str, Any]:
    """Load a drafter and skim a text with it. Never raises for what it finds.

    Returns:
        package, path, ok, lines, and when it works: backend, reason (why the CPU; empty for a
        GPU), load_s, prompt_tokens, kept_tokens, coverage, forward_s, tokens_per_s.
    """
    report: dict[str, Any] = {"package": "drafter_svc", "path": path, "ok": False}
    begin_s = time.monotonic()
    try:
        settings = DrafterSettings.load(overrides={"model": Path(path)})
        drafter = open_drafter(settings.name or Path(path).stem, Path(path), settings)
        load_s = time.monotonic() - begin_s
        try:
            ask = Ask()
            skimmed = skim(drafter, tokenise(SAMPLE, ask, drafter.tokenizer), ask)
        finally:
            drafter.close()
        check_canonical(skimmed.spans, SAMPLE)
    except SkimError as error:
        return {**report, "lines": [error.message]}
    rate = skimmed.prompt_tokens / skimmed.forward_s
    lines = [f"skims {rate:,.0f} tokens/s at {skimmed.prompt_tokens:,} tokens"]
    reason = drafter.why_cpu or ""
    if reason and examine_kernels()["backend"] == "cuda":  # else the kernels' doctor has said it
        lines.append(f"its passes run on the CPU: {reason}")
    return {
        **report,
        "ok": True,
        "lines": lines,
        "backend": drafter.backend.name,
        "reason": reason,
        "load_s": round(load_s, 3),
        "prompt_tokens": skimmed.prompt_tokens,
        "kept_tokens": skimmed.selection.kept_tokens,
        "coverage": skimmed.selection.coverage,
        "forward_s": round(skimmed.forward_s, 3),
        "tokens_per_s": round(rate),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the reports; 0 when nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m drafter_svc.doctor", description=__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="GGUF files of drafters")
    healthy = True
    for report in (examine(), *map(examine_model, parser.parse_args(arguments).paths)):
        healthy &= report["ok"]
        print(json.dumps(report), flush=True)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
