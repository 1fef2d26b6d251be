"""A control: the chunks nearest to either end of the prompt. A needle in the middle is missed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drafter_svc.backend import ScoreInput


class Ends:
    """Ranks chunks last, first, last but one, second, and so on."""

    name = "ends"

    def score(self, request: ScoreInput) -> NDArray[np.float32]:
        """Give scores in (0, 1], no two equal."""
        chunk = np.arange(request.num_chunks)
        from_end = request.num_chunks - 1 - chunk
        rank = np.where(from_end <= chunk, 2 * from_end, 2 * chunk + 1)
        return (1.0 - rank / request.num_chunks).astype(np.float32)
