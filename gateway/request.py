"""What a caller asked for, checked: the values that `session` works on.

`edge` builds an `Ask` from the wire. The services' own settings (selection, scoring, sampling,
speculation) are checked there and then travel on untouched, so here they are opaque.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.plan import Mode
from skim.spans import Span
from skim.v1 import common_pb2 as pb


@dataclass(frozen=True)
class Ask:
    """One request but its prompt and its id. Ranges count bytes of the upload.

    Attributes:
        model: target's name, or "" for the one that is served.
        drafter: drafter's name, or "" for the default.
        roles: one a chat message, as templates know them; empty: a raw prompt.
        sizes: bytes of each message's content where the caller stated all of them, else None.
        protected: ranges that must never be dropped.
        query: the range that asks, or None.
        control_ranges: raw prompts only: ranges parsed for special tokens, sorted and disjoint.
        protect_tail_tokens: never dropped at the end of the query.
        want_spans: whether the kept spans go into the answer.
    """

    model: str
    drafter: str
    mode: Mode
    roles: tuple[str, ...]
    sizes: tuple[int, ...] | None
    protected: tuple[Span, ...]
    query: Span | None
    control_ranges: tuple[Span, ...]
    protect_tail_tokens: int
    want_spans: bool
    selection: pb.SelectionConfig
    scoring: pb.ScoringConfig
    sampling: pb.SamplingConfig
    speculation: pb.SpeculationConfig
    positions: pb.PositionMode

    @property
    def stated_bytes(self) -> int | None:
        """Bytes of the whole upload where they are known beforehand."""
        return None if self.sizes is None else sum(self.sizes)
