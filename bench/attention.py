"""How fast one attention layer is, dense and over block lists, and what finding the blocks costs.

    python -m bench.attention --tokens 131072 --densities 0.035,0.05,0.065,dense [--sweep]

TFLOP/s are *useful*: operations of the listed pairs of tokens alone (a diagonal block counts half)
over the time of everything the launch does, the mean correction included. Lists are planted
(`bench.planted`: one a query head, the forced blocks among them, the real density printed); means,
scores and selection are timed by themselves, and their share of the sparse layer is given. Medians
by events; queries are put back between launches, outside the time. Beside them PyTorch's kernel,
dense. `--sweep` times the Hopper kernel's knobs at the first length. Rows that would start after
`--budget-s` are left out, and named. The last line is one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from bench import torch_attention
from bench.attention_layer import BLOCK, PATHS, Layer, Shape, listed_flops
from bench.gpu_options import aligned, commit, densities, integers, names, open_cuda
from bench.planted import plant
from kernels.device import Device
from kernels.errors import KernelError
from kernels.ops.attention_sm90 import TUNINGS, Tuning
from kernels.reference import BlockLists, BlockRule

RULE = BlockRule()  # sink 2, window 4, last_full 2: what is forced in every planted list
COMPARED_TOKENS = 1024  # of each path's output, the last ones: full lists and pruned ones


def variants(head_dim: int) -> dict[str, Tuning]:
    """Knobs that a sweep tries beside the usual ones; those that do not fit are refused later."""
    usual = TUNINGS[head_dim]
    return {
        "other turns": replace(usual, ping_pong=1 - usual.ping_pong),
        "a block an item": replace(usual, persistent=0),
        "a block an item, other turns": replace(usual, persistent=0, ping_pong=1 - usual.ping_pong),
        "one query slot": replace(usual, query_slots=1),
        "half key tiles": replace(usual, key_tile=64, stages=4),
        "half key tiles, 3 stages": replace(usual, key_tile=64, stages=3),
        "two stages": replace(usual, stages=2),
        "three stages": replace(usual, stages=3),
        "three stages, one query slot": replace(usual, stages=3, query_slots=1),
    }


class Bench:
    """One run: its options, its device, and the rows so far."""

    def __init__(self, options: argparse.Namespace, device: Device) -> None:
        self.options, self.device = options, device
        self.shape = Shape(options.heads, options.kv_heads, options.head_dim)
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.finding: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def has_time(self, row: str) -> bool:
        """Whether a row may start; one that may not is noted."""
        spent = time.monotonic() - self.began
        print(f"[{spent:6.1f} s] {row}", file=sys.stderr, flush=True)
        if spent < self.options.budget_s:
            return True
        self.left_out.append(row)
        return False

    def run_length(self, num_tokens: int, *, sweep: bool) -> None:
        """Every density and path at one length."""
        layer = Layer(self.device, self.shape, num_tokens)
        try:
            self.find(layer)
            for density in self.options.densities:
                lists = self.plant(layer, density)
                outputs = []
                for path in self.options.paths:
                    if layer.takes(path) and self.has_time(_label(path, num_tokens, density)):
                        outputs.append(self.attend(layer, path, density, lists))
                if len(outputs) == 2:
                    apart = np.abs(outputs[0] - outputs[1]).max()
                    self.rows[-1]["furthest_from_hopper"] = float(apart)
                if sweep and layer.takes("hopper"):
                    self.sweep(layer, density, lists)
        finally:
            layer.close()

    def plant(self, layer: Layer, density: float | None) -> BlockLists | None:
        """Draw the lists of a density and give them to the layer; None is dense."""
        if density is None:
            return None
        lists = plant(density, self.shape.num_heads, layer.num_tiles, RULE)
        layer.plant(lists)
        return lists

    def find(self, layer: Layer) -> None:
        """Time means, scores and selection."""
        if not self.has_time(f"finding {layer.num_tokens:,}"):
            return
        launches = self.options.launches
        work: dict[str, Callable[[], None]] = {
            "means_s": layer.means,
            "scores_s": layer.scores,
            "select_s": lambda: layer.select(RULE),
        }
        row: dict[str, Any] = {"tokens": layer.num_tokens, "launches": launches}
        for name, launch in work.items():
            row[name] = statistics.median(self.times(launch, lambda: None, launches))
        row["seconds"] = sum(row[name] for name in work)
        self.finding.append(row)

    def attend(
        self,
        layer: Layer,
        path: str,
        density: float | None,
        lists: BlockLists | None,
        knobs: str = "usual",
        tuning: Tuning | None = None,
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """Time one path over the planted lists; returns some of its output."""
        launch = layer.attention(
            path, dense=lists is None, full_tiles=RULE.last_full_blocks, tuning=tuning
        )
        launches = self.options.launches if path == "hopper" else self.options.portable_launches
        times = self.times(launch, layer.restore, launches)
        flops = listed_flops(self.shape, layer.num_tokens, lists)
        seconds = statistics.median(times)
        self.rows.append(
            {
                "path": path,
                "knobs": knobs,
                "tuning": asdict(tuning) if tuning else None,
                "tokens": layer.num_tokens,
                "asked_density": density,
                "density": 1.0 if lists is None else lists.density,
                "seconds": seconds,
                "fastest_s": min(times),
                "slowest_s": max(times),
                "launches": launches,
                "useful_tflops": flops / seconds * 1e-12,
            }
        )
        return layer.output(COMPARED_TOKENS)

    def sweep(self, layer: Layer, density: float | None, lists: BlockLists | None) -> None:
        """Time the Hopper kernel under other knobs."""
        seen = [TUNINGS[self.shape.head_dim]]
        for name, tuning in variants(self.shape.head_dim).items():
            row = f"{_label('hopper', layer.num_tokens, density)}, {name}"
            if tuning in seen or not self.has_time(row):
                continue
            seen.append(tuning)
            try:
                self.attend(layer, "hopper", density, lists, name, tuning)
            except KernelError as error:  # too much shared memory, or does not compile
                self.left_out.append(f"{row}: {error}")

    def times(
        self, launch: Callable[[], None], before: Callable[[], None], launches: int
    ) -> list[float]:
        """Device seconds of each launch after two that warm up; `before` is outside the time."""
        marks = []
        for _ in range(launches + 2):
            before()
            begin = self.device.record()
            launch()
            marks.append((begin, self.device.record()))
        return [end.seconds_since(begin) for begin, end in marks[2:]]

    def run_torch(self) -> None:
        """PyTorch's dense attention."""
        reason = torch_attention.why_not()
        for num_tokens in self.options.torch_tokens:
            row = f"PyTorch dense {num_tokens:,}"
            if reason is not None:
                self.left_out.append(f"{row}: {reason}")
            elif self.has_time(row):
                timed = torch_attention.seconds(self.shape, num_tokens, self.options.launches)
                flops = listed_flops(self.shape, num_tokens, None)
                self.rows.append(
                    {
                        "path": f"torch {timed.pop('by')}",
                        "knobs": "usual",
                        "tokens": num_tokens,
                        "asked_density": None,
                        "density": 1.0,
                        "useful_tflops": flops / timed["seconds"] * 1e-12,
                        **timed,
                    }
                )

    def summary(self) -> dict[str, Any]:
        """Everything, with what finding the blocks costs beside each sparse row."""
        finding_s = {row["tokens"]: row["seconds"] for row in self.finding}
        for row in self.rows:
            found = finding_s.get(row["tokens"])
            if found is not None and row["asked_density"] is not None:
                row["finding_share"] = found / (found + row["seconds"])
        return {
            "bench": "attention",
            "gpu": f"{self.device.name}, {self.device.arch}",
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "shape": asdict(self.shape),
            "rows": self.rows,
            "finding": self.finding,
            "left_out": self.left_out,
            "total_s": round(time.monotonic() - self.began, 1),
        }


def _label(path: str, num_tokens: int, density: float | None) -> str:
    return f"{path} {num_tokens:,} {'dense' if density is None else density}"


def table(summary: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [["path", "knobs", "tokens", "density", "ms", "TFLOP/s", "finding"]]
    for row in summary["rows"]:
        share = row.get("finding_share")
        lines.append(
            [
                row["path"],
                row["knobs"],
                f"{row['tokens']:,}",
                f"{row['density']:.4f}",
                f"{row['seconds'] * 1e3:.3f}",
                f"{row['useful_tflops']:.0f}",
                "-" if share is None else f"{share:.1%}",
            ]
        )
    for row in summary["finding"]:
        parts = "  ".join(
            f"{name[:-2]} {row[name] * 1e3:.3f}" for name in ("means_s", "scores_s", "select_s")
        )
        lines.append(["finding", parts, f"{row['tokens']:,}", "", f"{row['seconds'] * 1e3:.3f}"])
        lines[-1] += [""] * (len(lines[0]) - len(lines[-1]))
    rows = aligned(lines)
    notes = [f"left out: {row}" for row in summary["left_out"]]
    return "\n".join([f"{summary['gpu']}, {summary['shape']}, medians", *rows, *notes])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=integers, default=[131072, 65536, 32768, 16384, 8192, 262144])
    add("--densities", type=densities("dense"), default=[0.065, 0.05, 0.035, 0.1, None])
    add("--paths", type=_paths, default=list(PATHS))
    add("--heads", type=int, default=16)
    add("--kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=128, choices=list(TUNINGS))
    add("--launches", type=int, default=20)
    add("--portable-launches", type=int, default=5)
    add("--torch-tokens", type=integers, default=[131072, 32768], help="may be empty")
    add("--sweep", action="store_true", help="knobs of the Hopper kernel at the first length")
    add("--budget-s", type=float, default=300.0, help="no row starts later than this")
    options = parser.parse_args(arguments)
    smallest = min(options.tokens, default=BLOCK)
    if smallest < 1 or options.launches < 1 or options.portable_launches < 1:
        parser.error("tokens and launches must be at least 1")
    return options


def _paths(text: str) -> list[str]:
    return names(text, PATHS)


def main(
    arguments: Sequence[str] | None = None, open_device: Callable[[], Device] = open_cuda
) -> int:
    """Measure, print the table, then one JSON object."""
    options = parse(arguments)
    bench = Bench(options, open_device())
    for place, num_tokens in enumerate(options.tokens):
        bench.run_length(num_tokens, sweep=options.sweep and place == 0)
    bench.run_torch()  # last: what torch keeps of the memory is no longer missed
    summary = bench.summary()
    print(table(summary))
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
