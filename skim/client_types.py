"""What a client gives and gets: messages, options, events, answers.

Plain values; `client_wire` turns them into the wire's messages and back. Offsets are in UTF-8 bytes
of the upload (the prompt, or the messages' contents joined), durations in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

from skim.errors import EngineFault
from skim.spans import Span

RoleName = Literal["system", "user", "assistant", "tool"]
ModeName = Literal["auto", "full", "skim"]
PositionsName = Literal["auto", "compacted", "original"]


class Message(NamedTuple):
    """One chat message."""

    role: RoleName
    content: str


class Options(TypedDict, total=False):
    """Options of a request; what is left out takes the server's default.

    `deadline_s` is how many seconds the call may take. The first group is the request itself, the
    second says how much is kept, the third how it is scored, the fourth how the answer is sampled
    and drafted. Ranges and defaults: the wire's comments, `protos/skim/v1/`.
    """

    deadline_s: float

    request_id: str
    model: str
    drafter: str
    mode: ModeName
    positions: PositionsName
    protected: Sequence[tuple[int, int]]
    query: tuple[int, int]
    protect_tail_tokens: int
    control_ranges: Sequence[tuple[int, int]]
    want_spans: bool

    keep_ratio: float
    coverage: float
    min_keep: float
    max_keep: float
    head_chunks: int
    tail_chunks: int
    neighbour_chunks: int

    scorer: str
    lookahead_tokens: int
    alpha: float
    max_density: float
    scorer_seed: int

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop: Sequence[str]
    logprobs: int
    ignore_eos: bool
    speculation: bool
    draft_tokens: int


@dataclass(frozen=True)
class Admitted:
    """The request was accepted.

    Attributes:
        request_id: the caller's, or the one made by the gateway.
        model: the target that answers.
        drafter: the drafter that is asked if the prompt is long enough; empty: none.
    """

    request_id: str
    model: str
    drafter: str


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: `upload`, `queue`, `tokenise`, `memory` (the drafter waits for a GPU's), `score` or
            `prefill`.
        done: bytes (upload), layers (score), tokens (tokenise, prefill) or requests ahead (queue).
        total: the same unit; 0: not known yet.
    """

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Plan:
    """What was decided for the prompt.

    Attributes:
        skimmed: True: only the kept spans are prefilled.
        full_reason: why the whole prompt is: `forced`, `short_prompt`, `no_drafter`,
            `drafter_failed`, `drafter_late`, `low_coverage`, `spans_refused`; "" when skimmed.
        detail: one sentence about what went wrong; empty: nothing did.
        degraded: a full prefill was due but does not fit, so the best selection is used.
        drafter_prompt_tokens: the drafter's count; 0: not scored.
        drafter_kept_tokens: the drafter's count of what is kept.
        coverage: retained attention mass, [0, 1]; None: the scorer has none.
        density: mean density of the drafter's attention, (0, 1]; 0: not scored.
        layer_density: the same for each layer.
        cut_row_share: fraction of attention rows that `max_density` cut.
        forced_only: the protected chunks alone passed the budget.
        yarn_factor: context extension that the drafter used; 1: none.
        spans: kept ranges of the upload, where `want_spans` was set and not all is kept.
        scorer: which scorer ran; empty: none.
    """

    skimmed: bool
    full_reason: str
    detail: str
    degraded: bool
    drafter_prompt_tokens: int
    drafter_kept_tokens: int
    coverage: float | None
    density: float
    layer_density: tuple[float, ...]
    cut_row_share: float
    forced_only: bool
    yarn_factor: float
    spans: tuple[Span, ...] | None
    scorer: str


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token and its likeliest alternatives.

    Attributes:
        token_id: the target's id.
        token: its bytes, which need not be valid UTF-8.
        logprob: natural logarithm of its probability before temperature and truncation.
        top: the likeliest tokens, likeliest first; their own `top` is empty.
    """

    token_id: int
    token: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Text:
    """A piece of the answer: whole code points, possibly none."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Counts, in the target's tokens; `prompt_bytes` with the template's text."""

    prompt_tokens: int
    kept_tokens: int
    completion_tokens: int
    draft_tokens: int
    accepted_tokens: int
    target_steps: int
    prompt_bytes: int

    @property
    def acceptance_length(self) -> float:
        """Tokens generated for each step of the target; 0: no step ran."""
        return self.completion_tokens / self.target_steps if self.target_steps else 0.0


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds, at the gateway's edge. Stages overlap; 0: did not run."""

    upload_s: float
    queue_s: float
    tokenise_s: float
    score_s: float
    select_s: float
    park_s: float
    map_s: float
    prefill_s: float
    ttft_s: float
    decode_s: float
    unpark_s: float
    total_s: float


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: `eos`, `stop_text` or `length`.
        usage: counts.
        timings: as the gateway saw them.
        ttft_s: first byte sent to first token received, measured here; 0: no token came.
        total_s: first byte sent to this event, measured here.
        seed: what the draw used.
        positions: `compacted` or `original`.
        speculation: names of the methods that ran; empty: none.
    """

    reason: str
    usage: Usage
    timings: Timings
    ttft_s: float
    total_s: float
    seed: int
    positions: str
    speculation: str


Event = Admitted | Progress | Plan | Text | Finish


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    admitted: Admitted
    plan: Plan
    finish: Finish


@dataclass(frozen=True)
class Model:
    """One model behind the gateway.

    Attributes:
        name: the name to ask for.
        kind: `target` or `drafter`.
        serving: whether it answers now.
        detail: why it does not; empty when it does.
        model_digest: hexadecimal digest of the model file.
        max_prompt_tokens: the longest prompt it takes; 0: not known.
        chat: whether it has a chat template.
    """

    name: str
    kind: str
    serving: bool
    detail: str
    model_digest: str
    max_prompt_tokens: int
    chat: bool


@dataclass(frozen=True)
class Models:
    """The models behind the gateway; prompts under `skim_min_tokens` are prefilled whole."""

    models: tuple[Model, ...]
    skim_min_tokens: int

    @property
    def target(self) -> Model:
        """The model that answers."""
        return next(model for model in self.models if model.kind == "target")

    @property
    def drafters(self) -> tuple[Model, ...]:
        """The models that score."""
        return tuple(model for model in self.models if model.kind == "drafter")


class Gathered:
    """Gathers one answer from its events."""

    def __init__(self) -> None:
        self._texts: list[Text] = []
        self._admitted: Admitted | None = None
        self._plan: Plan | None = None
        self._finish: Finish | None = None

    def add(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case Admitted():
                self._admitted = event
            case Plan():
                self._plan = event
            case Text():
                self._texts.append(event)
            case Finish():
                self._finish = event

    def answer(self) -> Answer:
        """The answer, once its last event was taken.

        Raises:
            EngineFault: the gateway ended the answer without finishing it.
        """
        if self._admitted is None or self._plan is None or self._finish is None:
            raise EngineFault("the gateway ended the answer without finishing it")
        return Answer(
            text="".join(text.text for text in self._texts),
            token_ids=tuple(token for text in self._texts for token in text.token_ids),
            logprobs=tuple(item for text in self._texts for item in text.logprobs),
            admitted=self._admitted,
            plan=self._plan,
            finish=self._finish,
        )
