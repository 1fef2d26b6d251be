"""What every backend does before its model runs: check the ids, and score what needs no model.

Refuses ids outside the vocabulary (InvalidRequest).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from drafter_svc.backend import ChunkScores, ScoreInput
from drafter_svc.scorers import TEXT_SCORERS
from skim.errors import Cancelled, InvalidRequest


def check_ids(ids: NDArray[np.int32], vocab_size: int) -> None:
    """Refuse an id that the model has no embedding for."""
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        got = lowest if lowest < 0 else highest
        allowed = f"within the vocabulary, [0, {vocab_size})"
        raise InvalidRequest.field_value("ids", got, allowed)


def score_by_text(
    request: ScoreInput, stop: threading.Event, progress: Callable[[int, int], None]
) -> ChunkScores | None:
    """Score with a scorer that reads the ids alone; None when the request asks for attention.

    Raises:
        Cancelled: `stop` was set.
    """
    scorer = TEXT_SCORERS.get(request.scorer)
    if scorer is None:
        return None
    if stop.is_set():
        raise Cancelled("the scoring pass was stopped")
    progress(0, 0)
    started = time.perf_counter()
    scores = scorer.score(request)
    return ChunkScores(scores, stage_s={"score": time.perf_counter() - started})
