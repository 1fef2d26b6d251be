"""How a prompt's chunks get their scores: one file per scorer, found here by name.

Two kinds. An `AttentionScorer` says in which layers a few queries' attention is read, and the
backend's pass does the rest (`queries`, `tally`). A `TextScorer` needs no model.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from drafter_svc.backend import ScoreInput
from drafter_svc.scorers.ends import Ends
from drafter_svc.scorers.lexical import Lexical
from drafter_svc.scorers.mid_layer import MidLayer
from drafter_svc.scorers.random import Random
from drafter_svc.scorers.specprefill import SpecPrefill


class AttentionScorer(Protocol):
    """Scores by the drafter's attention."""

    name: str

    def scored_layers(self, num_layers: int) -> range:
        """The layers whose attention counts; the pass ends in the last of them."""
        ...


class TextScorer(Protocol):
    """Scores by the token ids alone."""

    name: str

    def score(self, request: ScoreInput) -> NDArray[np.float32]:
        """Give float32 [num_chunks]; higher is more important."""
        ...


ATTENTION_SCORERS: dict[str, AttentionScorer] = {
    scorer.name: scorer for scorer in (SpecPrefill(), MidLayer())
}
TEXT_SCORERS: dict[str, TextScorer] = {
    scorer.name: scorer for scorer in (Lexical(), Ends(), Random())
}

__all__ = ["ATTENTION_SCORERS", "TEXT_SCORERS", "AttentionScorer", "TextScorer"]
