"""When a pass pauses for the sake of a target that decodes on the same GPU.

Two processes on one GPU are time-sliced, so a pass without pauses makes every decode step several
times as long. While the landlord says that sequences are decoding, `cuda_backend` stops at points
between layers and between chunks of rows: after so much work the GPU is left alone for so long.
Pure arithmetic on a clock. Work is what passes on the clock while this pass's kernels run, the
slices that the GPU gives to others included.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pacer:
    """The pauses of one drafter's passes.

    Args:
        work_s: least work between two pauses.
        pause_s: length of a pause; 0: none.
        decoding: whether somebody else needs the GPU now; asked at every point.
        clock: seconds, monotonic.
        pause: spends a pause, and ends it early when the pass is stopped.
    """

    def __init__(
        self,
        work_s: float,
        pause_s: float,
        decoding: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        self.work_s, self.pause_s = work_s, pause_s
        self._decoding, self._clock, self._pause = decoding, clock, pause
        self._resumed_s = 0.0
        self.paused_s = 0.0

    def begin(self) -> None:
        """A pass begins."""
        self._resumed_s, self.paused_s = self._clock(), 0.0

    def point(self, finish: Callable[[], None], stop: threading.Event) -> None:
        """A place in the pass where it may pause.

        Args:
            finish: waits until the GPU has done all work that is queued; not called while nobody
                decodes, so that the queue never runs dry.
            stop: of the pass.
        """
        if self.pause_s <= 0.0 or not self._decoding():
            return
        finish()
        worked_until_s = self._clock()
        if worked_until_s - self._resumed_s < self.work_s:
            return
        self._pause(stop, self.pause_s)
        self._resumed_s = self._clock()
        self.paused_s += self._resumed_s - worked_until_s
