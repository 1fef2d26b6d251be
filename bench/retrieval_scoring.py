"""Worker processes that score the retrieval table's prompts with a drafter and select spans.

Each worker opens the drafters once, with one thread, and maps (cell, seed, drafter, variants) to
the spans of each variant. The selection is the drafter service's own, with the gateway's defaults
(one head chunk, four tail chunks, the last 256 tokens of the question's turn).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.retrieval_cases import Case, Cell, build_case, gold_kept, open_target
from drafter_svc.backend import ScoreInput
from drafter_svc.cpu_backend import CpuBackend
from drafter_svc.selection import (
    SelectionConfig,
    chunk_sizes,
    forced_chunks,
    kept_spans,
    select,
    token_ranges,
)
from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import TokenizedText, Tokenizer
from skim.spans import Span

PROTECT_TAIL_TOKENS = 256
CHUNK_TOKENS = 32


@dataclass(frozen=True)
class Variant:
    """One way to score and select; one row of the table for each cell."""

    scorer: str
    drafter: str
    keep_ratio: float
    neighbour_chunks: int = 1
    last_token_query: bool = True


@dataclass(frozen=True)
class Job:
    """One prompt under several variants."""

    cell: Cell
    seed: int
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Scored:
    """What came of a job."""

    job: Job
    case: Case
    spans: tuple[tuple[Span, ...], ...]  # one entry a variant
    gold: tuple[bool, ...]
    coverage: tuple[float | None, ...]
    density: float  # mean over layers of the first attention pass; 0: none ran


class _Worker:
    def __init__(self, target: Path, drafters: dict[str, Path]) -> None:
        self.tokenizer, self.pieces = open_target(target)
        self.backends = {n: CpuBackend.open(p, num_threads=1) for n, p in drafters.items()}
        self.tokenizers: dict[str, Tokenizer] = {}
        for name, path in drafters.items():
            with GgufFile.open(path) as file:
                self.tokenizers[name] = Tokenizer.from_gguf(file)

    def run(self, job: Job) -> Scored:
        case = build_case(job.cell, job.seed, self.tokenizer, self.pieces)
        texts: dict[str, TokenizedText] = {}
        passes: dict[tuple[str, str, bool], Any] = {}
        spans, gold, coverage, density = [], [], [], 0.0
        for variant in job.variants:
            if variant.drafter not in texts:
                texts[variant.drafter] = self.tokenizers[variant.drafter].encode(
                    case.prompt, case.control
                )
            text = texts[variant.drafter]
            key = (variant.drafter, variant.scorer, variant.last_token_query)
            if key not in passes:
                passes[key] = self._score(variant, text, case, job.seed)
            scores = passes[key]
            density = density or float(np.mean(scores.density or (0.0,)))
            kept, chosen = _select(variant, text, case, scores)
            spans.append(tuple(kept))
            gold.append(gold_kept(case, kept))
            coverage.append(chosen)
        return Scored(job, case, tuple(spans), tuple(gold), tuple(coverage), density)

    def _score(self, variant: Variant, text: TokenizedText, case: Case, seed: int) -> Any:
        begin, end = token_ranges(text.ends, [case.query])[0]
        request = ScoreInput(
            ids=text.ids,
            query_tokens=(int(begin), int(end)),
            scorer=variant.scorer,
            last_token_query=variant.last_token_query,
            seed=seed,
        )
        backend = self.backends[variant.drafter]
        return backend.score(request, stop=threading.Event(), progress=lambda done, total: None)


def _select(
    variant: Variant, text: TokenizedText, case: Case, scores: Any
) -> tuple[list[Span], float | None]:
    config = SelectionConfig(
        keep_ratio=variant.keep_ratio, neighbour_chunks=variant.neighbour_chunks
    )
    sizes = chunk_sizes(len(text), CHUNK_TOKENS)
    begin, end = token_ranges(text.ends, [case.query])[0]
    tail = np.array([[max(0, int(end) - PROTECT_TAIL_TOKENS), int(end)]], dtype=np.int64)
    forced = forced_chunks(sizes, config, tail)
    selection = select(scores.scores, scores.panel, forced, sizes, config)
    return kept_spans(selection.kept, text.ends, CHUNK_TOKENS, case.prompt), selection.coverage


_worker: _Worker | None = None


def start_worker(target: Path, drafters: dict[str, Path]) -> None:
    """Open the models in this worker process."""
    global _worker
    _worker = _Worker(target, drafters)


def run_job(job: Job) -> Scored:
    """Score one prompt in this worker process."""
    if _worker is None:
        raise RuntimeError("start_worker must run first in each worker process")
    return _worker.run(job)
