"""The CPU backend: the drafter's pass in NumPy, on every core, for machines without a GPU.

Opens a GGUF, keeps its weights in float32, and answers one `ScoreInput` at a time in the caller's
thread (see `cpu_forward` for the pass, `scorers` for what is read from it). It is also what the
CUDA backend is compared with. Refuses ids outside the vocabulary and look-ahead past its workspace.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from drafter_svc.architecture import DrafterWeights, load_weights, scaling_for
from drafter_svc.backend import ChunkScores, DrafterModel, ScoreInput
from drafter_svc.cpu_forward import CpuForward
from drafter_svc.cpu_pool import WorkPool
from drafter_svc.lookahead import Lookahead, check_workspace
from drafter_svc.scorers import ATTENTION_SCORERS, AttentionScorer
from drafter_svc.scorers.queries import QueryPlan, plan_queries
from drafter_svc.scorers.tally import Tally
from drafter_svc.text_pass import check_ids, score_by_text
from modelfile.gguf_file import GgufFile

DEFAULT_WORKSPACE_BYTES = 2 << 30


class CpuBackend:
    """A drafter on the CPU."""

    name = "cpu"

    def __init__(
        self,
        weights: DrafterWeights,
        *,
        num_threads: int | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        """Take loaded weights.

        Args:
            num_threads: None: one per core that this process may use.
            workspace_bytes: most that look-ahead's keys and values may take.
        """
        self._weights = weights
        self._model = weights.describe()
        self._workspace_bytes = workspace_bytes
        self._pool = WorkPool(num_threads or len(os.sched_getaffinity(0)))

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        num_threads: int | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> CpuBackend:
        """Load a GGUF file.

        Raises:
            ModelFileError: the file is unreadable, corrupt or of an unsupported architecture.
        """
        with GgufFile.open(path) as file:
            weights = load_weights(file)
        return cls(weights, num_threads=num_threads, workspace_bytes=workspace_bytes)

    @property
    def model(self) -> DrafterModel:
        """The loaded model."""
        return self._model

    def close(self) -> None:
        """End the worker threads; idempotent."""
        self._pool.close()

    def score(
        self,
        request: ScoreInput,
        *,
        stop: threading.Event,
        progress: Callable[[int, int], None],
    ) -> ChunkScores:
        """Score one prompt; see `Backend.score`."""
        check_ids(request.ids, self._model.vocab_size)
        by_text = score_by_text(request, stop, progress)
        if by_text is not None:
            return by_text
        return self._score_by_attention(request, ATTENTION_SCORERS[request.scorer], stop, progress)

    def _score_by_attention(
        self,
        request: ScoreInput,
        scorer: AttentionScorer,
        stop: threading.Event,
        progress: Callable[[int, int], None],
    ) -> ChunkScores:
        if request.lookahead_tokens:
            check_workspace(self._weights.shape, request, self._workspace_bytes)
        plan = plan_queries(request.num_tokens, request.query_tokens, request.last_token_query)
        ids = request.ids
        if plan.copied is not None:
            ids = np.concatenate([ids, ids[slice(*plan.copied)]])
        scaling = scaling_for(self._weights.shape, ids.size + request.lookahead_tokens)
        forward = CpuForward(self._weights, ids, scaling, request.attention, self._pool, stop)
        if request.lookahead_tokens:
            lookahead = Lookahead(self._weights, forward, scaling, request, plan, stop)
            tally = lookahead.run(scorer, progress)
        else:
            tally = _run(forward, scorer, self._weights.shape.layers, request, plan, progress)
        attention = forward.attention
        return ChunkScores(
            scores=tally.scores(),
            panel=tally.panel(),
            density=tuple(attention.densities),
            cut_row_share=attention.cut_rows / max(1, attention.rows),
            yarn_factor=scaling.factor,
            layers_run=len(attention.densities) + (0 if request.lookahead_tokens else 1),
            stage_s=forward.stage_s,
            num_queries=tally.num_queries,
            query_copied=plan.copied is not None,
        )


def _run(
    forward: CpuForward,
    scorer: AttentionScorer,
    num_layers: int,
    request: ScoreInput,
    plan: QueryPlan,
    progress: Callable[[int, int], None],
) -> Tally:
    """Run the layers up to the last scored one, and score as they come."""
    scored = scorer.scored_layers(num_layers)
    tally = Tally(
        plan.positions,
        request.num_tokens,
        len(scored),
        chunk_tokens=request.chunk_tokens,
        pool_kernel=request.pool_kernel,
    )
    progress(0, scored.stop)
    for index in range(scored.stop):
        last = index == scored.stop - 1
        if last:
            forward.project_keys(index, request.num_tokens)
        else:
            forward.project_layer(index)
        if index in scored:
            started = time.perf_counter()
            queries = forward.queries_at(index, plan.positions)
            tally.add_layer(queries, forward.buffers.keys()[:, : request.num_tokens])
            forward.stage_s["score"] += time.perf_counter() - started
        if not last:
            forward.finish_layer(index)
        progress(index + 1, scored.stop)
    return tally
