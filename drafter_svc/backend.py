"""What a drafter backend takes and gives: token ids in, one score per chunk out.

The service builds a `ScoreInput`, a `Backend` (`cpu_backend`, `cuda_backend`) runs the model's
forward pass and answers `ChunkScores`, and `selection` turns those into kept chunks. Nothing here
computes. Refuses values out of range by name; what depends on the model (ids past the vocabulary,
look-ahead that does not fit the workspace) is refused by the backend that knows it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from skim.errors import InvalidRequest

# In the place of the layers done: the pass has its turn and waits for its weights' device memory.
WAITING_FOR_MEMORY = -1

SCORERS = ("specprefill", "mid_layer", "lexical", "ends", "random")


def _check(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequest.field_value(name, got, allowed)


@dataclass(frozen=True)
class AttentionConfig:
    """How the drafter's block-sparse attention chooses its blocks (see `kernels/reference`)."""

    block_tokens: int = 128  # positions in a query tile and in a key block
    alpha: float = 0.1  # keep a block whose mass is at least alpha x the row's largest, [0, 1]
    sink_blocks: int = 2  # first blocks, always kept
    window_blocks: int = 4  # blocks up to and with the diagonal one, always kept; at least 1
    last_full_blocks: int = 2  # last query tiles that see every block
    max_density: float = 0.25  # most blocks kept in a row / causal blocks, (0, 1]; 1 = no bound
    dense_below_tokens: int = 8192  # shorter prompts get every block
    mean_correction: bool = True  # a pruned block is stood for by its mean key and mean value

    def __post_init__(self) -> None:
        _check(
            self.block_tokens >= 16 and self.block_tokens % 16 == 0,
            "attention.block_tokens",
            self.block_tokens,
            "a multiple of 16, at least 16",
        )
        _check(0.0 <= self.alpha <= 1.0, "attention.alpha", self.alpha, "in [0, 1]")
        _check(
            0.0 < self.max_density <= 1.0, "attention.max_density", self.max_density, "in (0, 1]"
        )
        _check(self.window_blocks >= 1, "attention.window_blocks", self.window_blocks, "at least 1")
        for name in ("sink_blocks", "last_full_blocks", "dense_below_tokens"):
            _check(getattr(self, name) >= 0, f"attention.{name}", getattr(self, name), "at least 0")


@dataclass(frozen=True)
class ScoreInput:
    """One prompt to score.

    Attributes:
        ids: int32 [num_tokens], the prompt in the drafter's tokens, at least one.
        query_tokens: half-open token range that asks; None means the end of the prompt.
        scorer: one of `SCORERS`.
        chunk_tokens: tokens per chunk, the unit of selection; the last chunk may be short.
        pool_kernel: width in tokens of the average pool over a row of scores; odd.
        last_token_query: the prompt's last token is a query beside those of `query_tokens`.
        lookahead_tokens: tokens the drafter generates greedily to be queries too. Above 0 it needs
            every layer's keys and values and the output matrix.
        seed: of the `random` scorer.
        attention: of the model's own layers; the scoring queries always see every key.
    """

    ids: NDArray[np.int32]
    query_tokens: tuple[int, int] | None = None
    scorer: str = "specprefill"
    chunk_tokens: int = 32
    pool_kernel: int = 13
    last_token_query: bool = True
    lookahead_tokens: int = 0
    seed: int = 0
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        shape, dtype = self.ids.shape, self.ids.dtype
        _check(self.ids.ndim == 1 and self.ids.size > 0, "ids", shape, "one row, not empty")
        _check(dtype == np.int32, "ids", dtype, "int32")
        if self.query_tokens is not None:
            begin, end = self.query_tokens
            _check(
                0 <= begin < end <= self.ids.size,
                "query",
                self.query_tokens,
                f"a non-empty token range within [0, {self.ids.size})",
            )
        _check(self.scorer in SCORERS, "scorer", self.scorer, f"one of {', '.join(SCORERS)}")
        _check(self.chunk_tokens >= 1, "chunk_tokens", self.chunk_tokens, "at least 1")
        _check(
            self.pool_kernel >= 1 and self.pool_kernel % 2 == 1,
            "pool_kernel",
            self.pool_kernel,
            "odd and at least 1",
        )
        _check(
            0 <= self.lookahead_tokens <= 64,
            "lookahead_tokens",
            self.lookahead_tokens,
            "in [0, 64]",
        )

    @property
    def num_tokens(self) -> int:
        """Prompt length in tokens."""
        return int(self.ids.size)

    @property
    def num_chunks(self) -> int:
        """Number of chunks, the short last one included."""
        return math.ceil(self.ids.size / self.chunk_tokens)


@dataclass(frozen=True)
class ChunkScores:
    """What a pass says about the prompt's chunks.

    Attributes:
        scores: float32 [num_chunks], finite; higher is more important; the scale means nothing.
        panel: float32 [num_rows, num_chunks], or None for scorers without attention. One row per
            (layer group, query): the query's softmax mass per chunk, averaged over the heads and
            layers of the group; each row sums to 1. Rows run group by group, queries within.
        density: per layer that attended, kept pairs of blocks / causal pairs; 1.0 when dense.
        cut_row_share: share of (layer, head, tile) rows that `max_density` cut, [0, 1].
        yarn_factor: context extension in force; 1.0 means none.
        layers_run: layers entered; the last of them stops after its queries and keys.
        stage_s: seconds by stage: embed, project, attend, mlp, score (and lookahead; on a GPU
            also find, the choice of blocks, which the CPU counts as attend).
        num_queries: scoring queries.
        query_copied: the query's tokens were run again after the prompt.
        memory_s: seconds before the pass in which it waited for its weights' device memory.
    """

    scores: NDArray[np.float32]
    panel: NDArray[np.float32] | None = None
    density: tuple[float, ...] = ()
    cut_row_share: float = 0.0
    yarn_factor: float = 1.0
    layers_run: int = 0
    stage_s: dict[str, float] = field(default_factory=dict)
    num_queries: int = 0
    query_copied: bool = False
    memory_s: float = 0.0


@dataclass(frozen=True)
class DrafterModel:
    """The loaded model, for `GetDrafter` and for logs."""

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    trained_context_tokens: int
    num_parameters: int
    weight_bytes: int


class Backend(Protocol):
    """Runs one pass at a time; the service's queue decides whose."""

    @property
    def name(self) -> str:
        """`cpu` or `cuda`."""
        ...

    @property
    def model(self) -> DrafterModel:
        """The loaded model."""
        ...

    def score(
        self,
        request: ScoreInput,
        *,
        stop: threading.Event,
        progress: Callable[[int, int], None],
    ) -> ChunkScores:
        """Run the pass in the calling thread.

        Args:
            request: what to score.
            stop: set by anybody to abandon the pass; looked at before each block of work.
            progress: called in this thread as (layers_done, layers_total), layers_done rising
                from 0; scorers without a model call it once, as (0, 0). Before that once with
                WAITING_FOR_MEMORY in the place of layers_done if the weights are parked.
        Raises:
            Cancelled: `stop` was set.
            InvalidRequest: an id is outside the vocabulary, or look-ahead does not fit.
            Unavailable: the weights are parked, and nobody is there to give them memory.
        """
        ...

    def close(self) -> None:
        """Release the weights and the worker threads; idempotent."""
        ...
