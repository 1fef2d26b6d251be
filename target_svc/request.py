"""One request below the wire: what was asked, what is planned, and what is answered.

`service.py` builds `Ask` and `Plan` from the wire's messages and turns events back into them;
`pipeline.py` works on these alone. Values only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from skim.spans import Span
from target_svc.sampling import Sampling

Positions = Literal["auto", "compacted", "original"]
EndReason = Literal["eos", "stop_text", "length"]


@dataclass(frozen=True)
class Ask:
    """Everything about a request but its prompt and plan, every field checked.

    Attributes:
        request_id: the caller's, or one of ours.
        max_tokens: tokens to generate at most.
        sampling: how to choose tokens; its seed is drawn already.
        stops: texts that end the answer.
        ignore_eos: go on after a token that would end the answer.
        speculate: whether drafting may be used.
        draft_tokens: tokens drafted for each verify batch, at most.
        positions: of the kept tokens; `auto` leaves it to the model's rope.
        control_ranges: byte ranges parsed for special tokens, sorted and disjoint.
        deadline_s: `time.monotonic()` at which the caller gives up, or None.
    """

    request_id: str
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    speculate: bool = True
    draft_tokens: int = 7
    positions: Positions = "auto"
    control_ranges: tuple[Span, ...] = ()
    deadline_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """What to prefill.

    Attributes:
        spans: canonical; None: the whole prompt.
        fallback: canonical; used where the whole prompt does not fit. None: there is none.
    """

    spans: tuple[Span, ...] | None
    fallback: tuple[Span, ...] | None = None


@dataclass(frozen=True)
class Queued:
    """Waiting for a slot: `done` of the `total` requests that were ahead have gone."""

    done: int
    total: int


@dataclass(frozen=True)
class Started:
    """The engine took the request."""

    kept_tokens: int
    original: bool
    degraded: bool
    queue_s: float
    map_s: float
    park_s: float = 0.0


@dataclass(frozen=True)
class Prefilled:
    """Prompt tokens prefilled so far."""

    done: int
    total: int


@dataclass(frozen=True)
class TokenScore:
    """A token, and the natural logarithm of its probability under the raw logits."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class AnswerToken:
    """One token of the answer.

    Attributes:
        token_id: the target's id.
        logprob: None unless asked for.
        top: the likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of the answer: whole code points, and the tokens that wrote them."""

    text: str
    tokens: tuple[AnswerToken, ...]


@dataclass(frozen=True)
class Ended:
    """The end of an answer."""

    reason: EndReason
    prompt_bytes: int
    prompt_tokens: int
    kept_tokens: int
    completion_tokens: int
    draft_tokens: int
    accepted_tokens: int
    steps: int
    prefill_s: float
    decode_s: float
    seed: int
    speculation: str


Event = Queued | Started | Prefilled | Piece | Ended
