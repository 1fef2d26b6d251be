"""Seconds by stage, on the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures named stages of one request; stages may repeat (they add up) and overlap."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.stages: dict[str, float] = {}

    def elapsed_s(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.monotonic() - self.started_s

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body, also when it raises."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - begin)

    def __getitem__(self, stage: str) -> float:
        """Seconds of a stage, 0.0 when it did not run."""
        return self.stages.get(stage, 0.0)
