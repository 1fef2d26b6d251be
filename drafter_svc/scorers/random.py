"""A control: chunks in random order. What any scorer must beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drafter_svc.backend import ScoreInput


class Random:
    """Draws every chunk's score from `request.seed`."""

    name = "random"

    def score(self, request: ScoreInput) -> NDArray[np.float32]:
        """Give uniform scores in [0, 1); the same seed gives the same scores."""
        return np.random.default_rng(request.seed).random(request.num_chunks, dtype=np.float32)
