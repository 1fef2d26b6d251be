"""How long a scoring pass takes on the GPU: by length, model shape, density and stage.

    python -m bench.drafter --shapes qwen3-0.6b --tokens 32768,131072 --densities 0.05,natural

Weights are random in the shapes of real drafters (`bench.random_model`). A *planted* row attends
to lists of a stated density (or of the forced blocks, where those are more), while means, scores
and selection run and are timed; a *natural* row attends to what the selection keeps. Passes run
back to back through the product's own backend: uploading ids and downloading scores are inside the
time. Beside them: PyTorch's dense forward of the same shape in the same run, and the natural
density of the bundled drafters on prose. Rows that would start after `--budget-s` are left out, and
named. Progress goes to standard error; the last line is one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import torch_dense
from bench.gpu_options import ROOT, aligned, commit, densities, integers, names, open_cuda
from bench.planted import PlantedLists
from bench.random_model import SHAPES, write_random_gguf
from drafter_svc.backend import AttentionConfig, ChunkScores, ScoreInput
from drafter_svc.cuda_backend import CudaBackend
from drafter_svc.cuda_marks import STAGES
from drafter_svc.cuda_workspace import CHUNK_ROWS
from kernels.device import Device

MIB = 1 << 20
BUNDLED = ("skim-drafter.gguf", "skim-drafter-cross.gguf")


class Bench:
    """One run: its options, its device, and the rows so far."""

    def __init__(self, options: argparse.Namespace, open_device: Callable[[], Device]) -> None:
        self.options, self.open_device = options, open_device
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.dense: list[dict[str, Any]] = []
        self.bundled: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.gpu = ""
        self.free_loaded = 0  # bytes, after the weights and before the first pass

    def has_time(self, row: str) -> bool:
        """Whether a row may start; one that may not is noted."""
        spent = time.monotonic() - self.began
        print(f"[{spent:6.1f} s] {row}", file=sys.stderr, flush=True)
        if spent < self.options.budget_s:
            return True
        self.left_out.append(row)
        return False

    def run_shape(self, name: str) -> None:
        """Every length and density of one shape."""
        options = self.options
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            path = write_random_gguf(Path(folder) / f"{name}.gguf", shape, layers=options.layers)
            planter = PlantedLists(None)
            backend = CudaBackend.open(
                path, self.open_device(), planted=planter, chunk_rows=options.chunk_rows
            )
        try:
            self.gpu = f"{backend.device.name}, {backend.device.arch}"
            self.free_loaded = backend.device.free_bytes()
            for num_tokens in options.tokens:
                ids = random_ids(num_tokens, shape.vocab_size)
                for density in options.densities:
                    label = "natural" if density is None else f"planted {density}"
                    row = f"{name} {num_tokens:,} {label}"
                    if self.has_time(row):
                        planter.density = density
                        self.rows.append(self.time_row(backend, name, ids, density))
                print("\n".join(backend.workspace.plan.lines()), file=sys.stderr, flush=True)
        finally:
            backend.close()

    def time_row(
        self, backend: CudaBackend, name: str, ids: NDArray[np.int32], density: float | None
    ) -> dict[str, Any]:
        """Warm up once, then time passes back to back."""
        request = ScoreInput(ids, attention=self.options.attention)
        backend.workspace.close()  # each row's peak is its own
        backend.planted.close()
        run(backend, request)
        passes = self.options.passes if density is not None else self.options.natural_passes
        seconds, results = [], []
        for _ in range(passes):
            began = time.perf_counter()
            results.append(run(backend, request))
            seconds.append(time.perf_counter() - began)
        stages = {s: statistics.median(r.stage_s[s] for r in results) for s in STAGES}
        densities = results[0].density
        return {
            "shape": name,
            "tokens": int(ids.size),
            "lists": "natural" if density is None else "planted",
            "asked_density": density,
            "density": statistics.fmean(densities) if densities else 1.0,
            "density_by_layer": [round(value, 4) for value in densities],
            "cut_row_share": results[0].cut_row_share,
            "seconds": statistics.median(seconds),
            "fastest_s": min(seconds),
            "slowest_s": max(seconds),
            "passes": passes,
            "stage_s": stages,
            "find_share_of_sparse": share(stages["find"], stages["find"] + stages["attend"]),
            "peak_bytes": self.free_loaded - backend.device.free_bytes(),
            "planned_bytes": backend.workspace.num_bytes,
            "planted_bytes": backend.planted.num_bytes,
            "plan_bytes": backend.workspace.plan.sizes,
        }

    def run_dense(self, name: str) -> None:
        """PyTorch's dense forward of a shape."""
        lengths = [n for n in self.options.torch_tokens if n in self.options.tokens]
        if not lengths:
            return
        reason = torch_dense.why_not()
        if reason is not None:
            self.left_out.append(f"{name} PyTorch dense: {reason}")
            return
        model = torch_dense.DenseModel(SHAPES[name], layers=self.options.layers)
        try:
            for num_tokens in lengths:
                row = f"{name} {num_tokens:,} PyTorch dense"
                if not self.has_time(row):
                    continue
                try:
                    timed = model.seconds(num_tokens, self.options.torch_passes)
                except RuntimeError as error:  # too little memory, say
                    self.left_out.append(f"{row}: {error}")
                    continue
                self.dense.append({"shape": name, "tokens": num_tokens, **timed})
        finally:
            model.close()

    def run_bundled(self) -> None:
        """Natural density of the bundled drafters on the standard library's prose."""
        for file in BUNDLED:
            path = ROOT / "models" / file
            backend = CudaBackend.open(path, self.open_device())
            try:
                for num_tokens in self.options.bundled_tokens:
                    if not self.has_time(f"{file} {num_tokens:,} natural"):
                        continue
                    request = ScoreInput(
                        prose_ids(path, num_tokens), attention=self.options.attention
                    )
                    run(backend, request)
                    began = time.perf_counter()
                    result = run(backend, request)
                    self.bundled.append(
                        {
                            "model": file,
                            "tokens": num_tokens,
                            "density": statistics.fmean(result.density),
                            "density_by_layer": [round(value, 4) for value in result.density],
                            "seconds": time.perf_counter() - began,
                        }
                    )
            finally:
                backend.close()

    def summary(self) -> dict[str, Any]:
        """Everything, with each row's ratio to the dense forward of its shape and length."""
        dense_s = {(row["shape"], row["tokens"]): row["seconds"] for row in self.dense}
        for row in self.rows:
            seconds = dense_s.get((row["shape"], row["tokens"]))
            row["times_faster_than_dense"] = seconds / row["seconds"] if seconds else None
        return {
            "bench": "drafter",
            "gpu": self.gpu,
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "layers": self.options.layers,
            "chunk_rows": self.options.chunk_rows,
            "rows": self.rows,
            "torch_dense": self.dense,
            "bundled": self.bundled,
            "left_out": self.left_out,
            "total_s": round(time.monotonic() - self.began, 1),
        }


def run(backend: CudaBackend, request: ScoreInput) -> ChunkScores:
    """One pass."""
    return backend.score(request, stop=threading.Event(), progress=lambda done, total: None)


def random_ids(num_tokens: int, vocab_size: int) -> NDArray[np.int32]:
    """Draw a prompt; seed 0."""
    return np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(np.int32)


def prose_ids(path: Path, num_tokens: int) -> NDArray[np.int32]:
    """Tokenise prose for a bundled model; the last of the ids is a question's."""
    from modelfile.gguf_file import GgufFile  # a tokenizer is needed here alone
    from modelfile.tokenizer import Tokenizer
    from skim.demo_document import build_demo

    with GgufFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    # Four characters and more a token: enough text, then cut from the front.
    document = build_demo(2 * num_tokens, lambda text: max(1, len(text) // 4), seed=0)
    ids = tokenizer.encode(f"{document.text}\n\n{document.question}".encode()).ids
    if ids.size < num_tokens:
        ids = np.tile(ids, -(-num_tokens // ids.size))
    return np.ascontiguousarray(ids[-num_tokens:], dtype=np.int32)


def share(part: float, whole: float) -> float:
    """A ratio that is 0 of nothing."""
    return part / whole if whole else 0.0


def table(summary: dict[str, Any]) -> str:
    """The figures for people."""
    head = ["shape", "tokens", "lists", "density", "ms", *STAGES, "peak GiB", "x dense"]
    lines = [head]
    for row in summary["rows"]:
        ratio = row["times_faster_than_dense"]
        lines.append(
            [
                row["shape"],
                f"{row['tokens']:,}",
                row["lists"],
                f"{row['density']:.3f}",
                f"{row['seconds'] * 1e3:.1f}",
                *(f"{row['stage_s'][stage] * 1e3:.1f}" for stage in STAGES),
                f"{row['peak_bytes'] / (1024 * MIB):.2f}",
                f"{ratio:.1f}" if ratio else "-",
            ]
        )
    for row in summary["torch_dense"]:
        cells = [row["shape"], f"{row['tokens']:,}", f"PyTorch, {row['by']}", "1.000"]
        cells.append(f"{row['seconds'] * 1e3:.1f}")
        lines.append(cells + ["-"] * (len(head) - len(cells)))
    for row in summary["bundled"]:
        cells = [row["model"], f"{row['tokens']:,}", "natural", f"{row['density']:.3f}"]
        cells.append(f"{row['seconds'] * 1e3:.1f}")
        lines.append(cells + ["-"] * (len(head) - len(cells)))
    rows = aligned(lines)
    notes = [f"left out: {row}" for row in summary["left_out"]]
    return "\n".join([f"{summary['gpu']}, times in ms, medians", *rows, *notes])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.drafter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", type=_shapes, default=["qwen3-0.6b"], help="names, or `all`; may be empty")
    add("--tokens", type=integers, default=[8192, 16384, 32768, 65536, 131072, 262144])
    add(
        "--densities",
        type=densities("natural"),
        default=[0.05, 0.1, None],
        help="numbers and `natural`",
    )
    add("--passes", type=int, default=10, help="timed passes of a planted row")
    add("--natural-passes", type=int, default=3, help="timed passes of a natural row")
    add("--torch-tokens", type=integers, default=[32768, 131072], help="dense rows; may be empty")
    add("--torch-passes", type=int, default=3)
    add("--bundled-tokens", type=integers, default=[8192, 16384, 32768], help="may be empty")
    add("--layers", type=int, help="instead of the shapes' own")
    add("--chunk-rows", type=int, default=CHUNK_ROWS)
    add("--dense-below", type=int, default=AttentionConfig().dense_below_tokens)
    add("--budget-s", type=float, default=540.0, help="no row starts later than this")
    add("--scratch", type=Path, default=Path("/dev/shm"), help="where model files go for a while")
    options = parser.parse_args(arguments)
    options.attention = replace(AttentionConfig(), dense_below_tokens=options.dense_below)
    return options


def _shapes(text: str) -> list[str]:
    return list(SHAPES) if text == "all" else names(text, SHAPES)


def main(
    arguments: Sequence[str] | None = None, open_device: Callable[[], Device] = open_cuda
) -> int:
    """Measure, print the table, then one JSON object."""
    options = parse(arguments)
    bench = Bench(options, open_device)
    for name in options.shapes:
        bench.run_shape(name)
    if options.bundled_tokens:
        bench.run_bundled()
    for name in options.shapes:  # last: what torch keeps of the memory is no part of our peak
        bench.run_dense(name)
    summary = bench.summary()
    print(table(summary))
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
