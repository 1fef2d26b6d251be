"""The CUDA backend: the drafter's pass on one GPU, behind the same interface as the CPU's.

Holds a device, the weights in one region on it (`cuda_weights`) and one arena for the passes
(`cuda_workspace`); `cuda_forward` queues a pass layer by layer. The host stays about one layer
ahead of the GPU, so the stop flag is looked at and progress told between layers while the queue
never runs dry. Only chunk scores, the coverage panel and the counts of kept blocks come back.
Leased weights (`residency`) are held for the length of a pass, which may begin while its later
layers are still on their way; a `pacer` makes it pause for a target that decodes.

Refuses (InvalidRequest) ids outside the vocabulary, prompts of more blocks than the kernels select
from, attention blocks of other than 128 tokens, and look-ahead, which only the CPU backend
computes. What the kernels raise is mapped by `cuda_errors`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from drafter_svc.architecture import scaling_for
from drafter_svc.backend import (
    WAITING_FOR_MEMORY,
    AttentionConfig,
    ChunkScores,
    DrafterModel,
    ScoreInput,
)
from drafter_svc.cuda_attention import CudaAttention, most_sparse_rows
from drafter_svc.cuda_errors import kernel_errors
from drafter_svc.cuda_forward import CudaForward
from drafter_svc.cuda_lists import PassLists, PlantedOnDevice, Planter, rule_of
from drafter_svc.cuda_marks import StageMarks
from drafter_svc.cuda_scoring import CudaScoring
from drafter_svc.cuda_weights import CudaWeights
from drafter_svc.cuda_workspace import BLOCK_TOKENS, CHUNK_ROWS, PassSize, Workspace, plan_pass
from drafter_svc.pacing import Pacer
from drafter_svc.residency import Arrivals, Residency
from drafter_svc.scorers import ATTENTION_SCORERS, AttentionScorer
from drafter_svc.scorers.queries import QueryPlan, plan_queries
from drafter_svc.scorers.tally import LAYER_GROUPS
from drafter_svc.text_pass import check_ids, score_by_text
from kernels.device import Device, Mark
from kernels.errors import NoDevice
from kernels.ops.tail_score import MAX_POOL
from modelfile.gguf_file import GgufFile
from skim.errors import Cancelled, InvalidRequest, PromptTooLong

# Of the pass that warms up: a full chunk of rows, since cuBLASLt has other code for fewer.
WARM_UP_TOKENS = CHUNK_ROWS


class CudaBackend:
    """A drafter on one GPU. One pass at a time; any thread may run it.

    Attributes:
        device, weights: as given.
        workspace: the arena of the passes.
        planted: holds planted lists on the device, beside the arena.
        pacer: of the passes, or None.
    """

    name = "cuda"

    def __init__(
        self,
        device: Device,
        weights: CudaWeights,
        *,
        planted: Planter | None = None,
        chunk_rows: int = CHUNK_ROWS,
        residency: Residency | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        """Take a device and weights that are on it; both are closed with the backend.

        Args:
            planted: gives the block lists that stand in for the selected ones; benchmarks only.
            chunk_rows: see `cuda_workspace.CHUNK_ROWS`.
            residency: of weights that a landlord gives memory to; closed in the place of the
                device, which is not the backend's then. None: the weights stay where they are.
            pacer: makes a pass pause while others need the GPU; None: it never does.
        """
        self.device = device
        self.weights = weights
        self.workspace = Workspace(device)
        self._model = weights.describe()
        self.planted = PlantedOnDevice(device, planted)
        self._chunk_rows = chunk_rows
        self._residency, self.pacer = residency, pacer
        if residency is not None:
            residency.on_release = self._release
        self._closed = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: Device | None = None,
        *,
        planted: Planter | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> CudaBackend:
        """Load a GGUF file onto a GPU.

        Args:
            device: closed with the backend, or if it cannot be opened; None: the first GPU.
            planted, chunk_rows: see `__init__`.

        Raises:
            ModelFileError: the file is unreadable, corrupt, or a model the kernels do not take.
            Busy: the weights do not fit the GPU's free memory.
            ConfigError: there is no usable GPU, or a package of the gpu extra is missing.
            EngineFault: a kernel failed.
        """
        with kernel_errors(f"loading {path}"):
            device = device or first_gpu()
            try:
                with GgufFile.open(path) as file:
                    weights = CudaWeights.load(device, file)
            except BaseException:
                device.close()
                raise
        return cls(device, weights, planted=planted, chunk_rows=chunk_rows)

    @property
    def model(self) -> DrafterModel:
        """The loaded model."""
        return self._model

    def close(self) -> None:
        """Release the arena, the weights and the device (or their residency); idempotent.

        Raises:
            EngineFault: the GPU failed; everything was let go all the same.
        """
        if self._closed:
            return
        self._closed = True
        with kernel_errors("closing"), ExitStack() as stack:
            place = self._residency or self.device
            for part in (place, self.weights, self.workspace, self.planted):
                stack.callback(part.close)  # the last one first, each whatever the others raise

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
        _check_supported(request)
        self._check_length(self.plan(request)[1])
        scorer = ATTENTION_SCORERS[request.scorer]
        with kernel_errors(f"scoring {request.num_tokens} tokens"):
            if self._residency is None:
                return self._score_by_attention(request, scorer, stop, progress, ())
            began_s = time.monotonic()
            layers = scorer.scored_layers(self._model.num_layers).stop
            with self._residency.hold(
                stop, lambda: progress(WAITING_FOR_MEMORY, layers)
            ) as arrivals:
                memory_s = time.monotonic() - began_s
                scores = self._score_by_attention(request, scorer, stop, progress, arrivals)
            return replace(scores, memory_s=memory_s)

    def _release(self) -> int:
        """Give back what passes keep on the device; how many bytes that were."""
        held = self.workspace.num_bytes + self.planted.num_bytes
        self.workspace.close()
        self.planted.close()
        return held

    def warm_up(
        self, stop: threading.Event | None = None, *, num_tokens: int = WARM_UP_TOKENS
    ) -> float:
        """Run a sparse and a dense pass, so that no request waits for kernels to be made ready.

        Kernels are compiled (or read from the cache of cubins) and loaded where they are first
        launched, and so is what cuBLASLt chooses for large products. Lists are not planted, and
        the arena is given back.

        Args:
            stop: see `score`.
            num_tokens: of the sparse pass.
        Returns:
            Seconds it took.
        Raises:
            Cancelled: `stop` was set.
            Busy: the GPU's free memory is too little for a pass.
            EngineFault: a kernel cannot be compiled, or failed.
        """
        began_s = time.monotonic()
        planted, self.planted = self.planted, PlantedOnDevice(self.device, None)
        # Two widths of the pool: the usual one has a kernel of its own.
        sparse, dense = AttentionConfig(dense_below_tokens=0), AttentionConfig(max_density=1.0)
        widths = (ScoreInput.pool_kernel, ScoreInput.pool_kernel + 2)
        try:
            for size, attention, width in (
                (num_tokens, sparse, widths[0]),
                (BLOCK_TOKENS + 1, dense, widths[1]),
            ):
                ids = (np.arange(size) % self._model.vocab_size).astype(np.int32)
                request = ScoreInput(ids, attention=attention, pool_kernel=width)
                self.score(request, stop=stop or threading.Event(), progress=_nobody)
        finally:
            self.planted = planted
            self.workspace.close()
        return time.monotonic() - began_s

    def _pauses(self, stop: threading.Event) -> Callable[[], None]:
        """What a pass calls where it may pause."""
        pacer = self.pacer
        if pacer is None:
            return lambda: None
        pacer.begin()
        return lambda: pacer.point(lambda: self.device.record(timed=False).wait, stop)

    def plan(self, request: ScoreInput) -> tuple[QueryPlan, PassSize]:
        """Where the queries of a request stand, and what the size of its pass depends on."""
        queries = plan_queries(request.num_tokens, request.query_tokens, request.last_token_query)
        scored = ATTENTION_SCORERS[request.scorer].scored_layers(self._model.num_layers)
        num_rows = request.num_tokens + queries.copied_tokens
        size = PassSize(
            num_rows=num_rows,
            num_tokens=request.num_tokens,
            num_queries=int(queries.positions.size),
            chunk_tokens=request.chunk_tokens,
            num_attending=scored.stop - 1,
            num_groups=min(LAYER_GROUPS, len(scored)),
            sparse=num_rows >= request.attention.dense_below_tokens,
            chunk_rows=self._chunk_rows,
        )
        return queries, size

    def _check_length(self, size: PassSize) -> None:
        most = most_sparse_rows(self.device.arch, self.weights.shape.head_dim)
        if size.sparse and size.num_rows > most:
            limit = most - (size.num_rows - size.num_tokens)  # a copied query takes its part
            raise PromptTooLong(
                f"prompt must be at most {limit} tokens on this GPU, got {size.num_tokens}",
                field="prompt",
                metadata={"limit": str(limit), "got": str(size.num_tokens)},
            )

    def _score_by_attention(
        self,
        request: ScoreInput,
        scorer: AttentionScorer,
        stop: threading.Event,
        progress: Callable[[int, int], None],
        arrivals: Arrivals,
    ) -> ChunkScores:
        queries, size = self.plan(request)
        ids = request.ids
        if queries.copied is not None:
            ids = np.concatenate([ids, ids[slice(*queries.copied)]])
        scaling = scaling_for(self.weights.shape, ids.size)
        scored = scorer.scored_layers(self._model.num_layers)
        self.workspace.prepare(plan_pass(self.weights.shape, size))
        marks = StageMarks(self.device)
        pause = self._pauses(stop)
        forward = CudaForward(
            self.device, self.weights, self.workspace, size, scaling, marks, pause
        )
        scoring = CudaScoring(
            self.device,
            self.weights.shape,
            self.workspace,
            size,
            queries.positions,
            len(scored),
            pool_kernel=request.pool_kernel,
        )
        lists = PassLists(
            self.device,
            self.workspace,
            size,
            self.weights.shape.heads,
            rule_of(request.attention),
            self.planted,
        )
        attention = CudaAttention(
            self.device, self.weights.shape, self.workspace, size, request.attention, lists
        )
        progress(0, scored.stop)
        if arrivals:  # the embeddings come with the first layer
            self.device.wait_for(arrivals[0])
        forward.embed(ids)
        reached: list[Mark] = []
        for index in range(scored.stop):
            if stop.is_set():
                raise Cancelled("the scoring pass was stopped")
            if index:
                pause()
            if arrivals:
                self.device.wait_for(arrivals[index])
            last = index == scored.stop - 1
            if last:
                forward.project_last(index)
            else:
                forward.project(index)
            if index in scored:
                forward.score(scoring, last=last)
            if not last:
                forward.finish(index, attention)
            reached.append(self.device.record(timed=False))
            if index:  # one layer is queued behind the one that is waited for
                reached[index - 1].wait()
                progress(index, scored.stop)
        scoring.reduce()
        marks.end("score")
        scores, panel = scoring.result()
        progress(scored.stop, scored.stop)
        densities, cut_row_share = lists.result()
        return ChunkScores(
            scores=scores,
            panel=panel,
            density=densities,
            cut_row_share=cut_row_share,
            yarn_factor=scaling.factor,
            layers_run=scored.stop,
            stage_s=marks.seconds(),
            num_queries=size.num_queries,
            query_copied=queries.copied is not None,
        )


def _nobody(done: int, total: int) -> None:
    """Of a pass whose progress nobody follows."""


def first_gpu() -> Device:
    """Open the first GPU; NoDevice when there is none, or a package is missing."""
    try:
        from kernels.cuda_device import CudaDevice
    except ImportError as error:
        raise NoDevice(
            "device", f"a package is missing ({error}): pip install 'skim[gpu]'"
        ) from error
    return CudaDevice()


def _check_supported(request: ScoreInput) -> None:
    if request.lookahead_tokens:
        raise InvalidRequest.field_value(
            "lookahead_tokens",
            request.lookahead_tokens,
            "0 on a drafter that runs on a GPU",
            reason="LOOKAHEAD_UNSUPPORTED",
        )
    if request.pool_kernel > MAX_POOL:
        raise InvalidRequest.field_value(
            "pool_kernel",
            request.pool_kernel,
            f"at most {MAX_POOL} on a drafter that runs on a GPU",
        )
    if request.attention.block_tokens != BLOCK_TOKENS:
        raise InvalidRequest.field_value(
            "attention.block_tokens",
            request.attention.block_tokens,
            f"{BLOCK_TOKENS} on a drafter that runs on a GPU",
        )
