"""What the service process and its engine child say to each other.

The service sends Open once, then Submit, Cancel, Reserve, Release. The engine answers Ready or
StartFailed; then Progress, Tokens and one Done or Failed for each request; Reserved, ReserveFailed
or Released; and Load. `frames.py` turns them into bytes. Values only: nothing here checks ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from target_svc.sampling import Sampling

Int32s = NDArray[np.int32]
Float32s = NDArray[np.float32]
KvType = Literal["f16", "q8_0", "q4_0"]
DoneReason = Literal["stop", "length"]


def _no_ints() -> Int32s:
    return np.zeros(0, np.int32)


def _no_floats() -> Float32s:
    return np.zeros(0, np.float32)


@dataclass(frozen=True)
class EngineConfig:
    """How the engine opens its model; the service checks the ranges before it starts a child."""

    model_path: str
    slots: int = 1  # sequences in the working context
    kept_max: int = 16_384  # prompt tokens a slot takes
    gen_max: int = 2_048  # generated tokens a slot takes
    kv_type: KvType = "f16"
    n_batch: int = 2_048  # prefill chunk, and ubatch: the largest is the fastest on the CPU too
    threads: int = 0  # 0: the cores this process may use
    threads_batch: int = 0  # 0: the same
    gpu_layers: int = -1  # -1: all, where the build has a GPU backend
    flash_attention: bool = True
    draft_tokens_max: int = 7  # so that a verify batch has at most 8 rows; 0: no speculation
    # Longest stretch of a prefill that does not see a cancellation: a second, less the way there.
    # Chunks are halved to keep it (on a CPU at 15,000 tokens of depth that costs 6 %); 0: never.
    deaf_max_s: float = 0.9
    max_waiting: int = 64  # requests waiting for cells; the service admits long before this


@dataclass(frozen=True)
class Open:
    """Load the model and create the working context. Always the first frame."""

    config: EngineConfig


@dataclass(frozen=True, eq=False)
class Submit:
    """Run one request.

    Attributes:
        ids: int32 [n], n >= 1: the tokens to prefill, in order.
        positions: int32 [n], strictly increasing, or empty for 0..n-1 (COMPACTED).
        original_ids: int32 [any]: the whole prompt before compaction, for n-gram drafting only.
        next_position: position of the first generated token: n when compacted, else the length of
            the original prompt; 0 means one past the last position, the least it may be.
        stop_ids: tokens that end the answer and are not emitted; empty: the model's own eog set.
        deadline_monotonic_s: `time.monotonic()` at which the request fails; one clock on one host.
        full: run in the reserved full context instead of the working one.
        speculate: whether drafting may be used (it never changes what is emitted).
        draft_tokens: most tokens drafted for a verify batch; 0: what the engine was opened with.
        ignore_eos: no token ends the answer; `stop_ids` is not looked at.
    """

    request_id: str
    ids: Int32s
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    positions: Int32s = field(default_factory=_no_ints)
    original_ids: Int32s = field(default_factory=_no_ints)
    next_position: int = 0  # 0: one past the last position
    stop_ids: Int32s = field(default_factory=_no_ints)
    deadline_monotonic_s: float | None = None
    full: bool = False
    speculate: bool = True
    draft_tokens: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Cancel:
    """Stop a request and free its cells; Failed with error Cancelled answers if it still ran."""

    request_id: str


@dataclass(frozen=True)
class Reserve:
    """Create the one full context."""

    cells: int
    kv_type: KvType


@dataclass(frozen=True)
class Release:
    """Free the full context; requests still in it fail."""


@dataclass(frozen=True, eq=False)
class Ready:
    """The model is loaded, the working context warm. Facts about both."""

    architecture: str
    description: str
    n_vocab: int
    n_ctx_train: int
    n_layer: int
    n_embd: int
    model_bytes: int
    parameters: int
    rope_type: str  # none, norm, neox, mrope, imrope, vision
    allows_gaps: bool  # whether positions may have gaps (ORIGINAL)
    can_rollback: bool  # whether a verify batch can be undone, hence speculation
    recurrent: bool
    gpu: bool  # whether layers run on a GPU
    slots: int
    cells: int  # of the working context, shared by its slots
    cells_per_slot: int
    kv_bytes_per_cell: int  # measured on the warm working context
    n_batch: int
    threads: int
    load_s: float
    warm_s: float
    eog_ids: Int32s  # every token that ends an answer
    # What the working context took beside its cells; 0: llama.cpp did not tell.
    state_bytes_per_slot: int = 0  # of recurrent layers, snapshots for rollback included
    scratch_bytes: int = 0  # of its graph, which grows with cells and n_batch


@dataclass(frozen=True)
class StartFailed:
    """The model could not be opened; the child exits. `error` names a class of skim.errors."""

    error: str
    reason: str
    message: str


@dataclass(frozen=True)
class Progress:
    """Prompt tokens prefilled so far; the first, with 0, says that the request left the queue."""

    request_id: str
    prefilled: int
    total: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of one step, in order.

    Attributes:
        ids: int32 [m].
        logprobs: float32 [m] natural logs under the raw logits; empty unless asked for.
        top_ids, top_logprobs: [m * k], row by row, best first; empty unless k > 0 was asked for.
        draft_tokens, accepted_tokens, steps: as in Done, so far: an answer that the service ends at
            a stop text gets no Done.
    """

    request_id: str
    ids: Int32s
    logprobs: Float32s = field(default_factory=_no_floats)
    top_ids: Int32s = field(default_factory=_no_ints)
    top_logprobs: Float32s = field(default_factory=_no_floats)
    draft_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Done:
    """The answer ended: `stop` by a stop id (named in stop_id), `length` by max_tokens."""

    request_id: str
    reason: DoneReason
    prompt_tokens: int  # prefilled
    output_tokens: int  # emitted; the stop token is not
    stop_id: int  # -1 when reason is length
    draft_tokens: int  # proposed to verify batches
    accepted_tokens: int  # proposed and emitted
    steps: int  # decode and verify batches
    queue_s: float  # Submit to its first chunk
    prefill_s: float  # first chunk to first token
    decode_s: float  # first token to last
    first_token_monotonic_s: float

    @property
    def acceptance_length(self) -> float:
        """Tokens chosen per decode step, bonus and stop tokens included; 0 without a step."""
        chosen = self.output_tokens - 1 + (self.reason == "stop")  # prefill chose the first
        return chosen / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Failed:
    """The request ended without an answer. `error` names a class of skim.errors."""

    request_id: str
    error: str
    reason: str
    message: str


@dataclass(frozen=True)
class Reserved:
    """The full context exists and is warm."""

    cells: int
    create_s: float
    warm_s: float


@dataclass(frozen=True)
class ReserveFailed:
    """There is no full context. `error` names a class of skim.errors."""

    error: str
    reason: str
    message: str


@dataclass(frozen=True)
class Released:
    """No full context exists any more; its memory is back."""


@dataclass(frozen=True)
class Load:
    """Where the engine stands; sent on every change and about twice a second while it runs."""

    running: int
    waiting: int
    decoding: int
    cells_used: int  # promised to running requests, in the working context
    cells: int
    full_cells: int  # 0: none reserved
    prefill_tokens_per_s: float  # of recent chunks; 0 before the first
    decode_tokens_per_s: float  # of recent steps, over all sequences; 0 before the first


ToEngine = Open | Submit | Cancel | Reserve | Release
FromEngine = (
    Ready
    | StartFailed
    | Progress
    | Tokens
    | Done
    | Failed
    | Reserved
    | ReserveFailed
    | Released
    | Load
)
Message = ToEngine | FromEngine
