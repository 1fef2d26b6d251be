"""When a pass pauses for the sake of a target that decodes on the same GPU.

Two processes on one GPU are time-sliced, so a pass without pauses makes every decode step several
times as long. While the landlord says that sequences are decoding, `cuda_backend` stops at points
between layers and between chunks of rows: after so much work the GPU is left alone for so long.
Pure arithmetic on a clock. What passes on it while the pass's kernels run is not all its own work:
the GPU gives slices to the decoding process too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeAlias

# Of the time beside a process that decodes, what a pass gets: products beside decode steps of a
# 27B model kept 0.65 of their rate on an H200. 14 ms of work and 15 ms of pause are then 36.5 ms.
SHARE_BESIDE_DECODING = 0.65


Wait: TypeAlias = Callable[[], object]  # blocks until a mark is reached


class Pacer:
    """The pauses of one drafter's passes.

    Args:
        work_s: least work of its own between two pauses.
        pause_s: length of a pause; 0: none.
        decoding: whether somebody else needs the GPU now; asked at every point.
        share: own work in a second on the clock while somebody decodes, (0, 1].
        clock: seconds, monotonic.
        pause: spends a pause, and ends it early when the pass is stopped.
    """

    def __init__(
        self,
        work_s: float,
        pause_s: float,
        decoding: Callable[[], bool],
        *,
        share: float = SHARE_BESIDE_DECODING,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        self.work_s, self.pause_s = work_s, pause_s
        self._decoding, self._clock, self._pause = decoding, clock, pause
        self._share, self._resumed_s, self.paused_s = share, 0.0, 0.0
        self._before: Wait | None = None

    def begin(self) -> None:
        """A pass begins."""
        self._resumed_s, self.paused_s = self._clock(), 0.0
        self._before = None

    def point(self, record: Callable[[], Wait], stop: threading.Event) -> None:
        """A place in the pass where it may pause.

        Waits for the work before the point before this one's, so that the GPU always has a piece
        in its queue; a pause begins when that one is done too.

        Args:
            record: marks the end of all work that is queued, and gives what waits for it; not
                called while nobody decodes.
            stop: of the pass.
        """
        if self.pause_s <= 0.0 or not self._decoding():
            self._before = None
            return
        before, self._before = self._before, record()
        if before is not None:
            before()
        if (self._clock() - self._resumed_s) * self._share < self.work_s:
            return
        self._before()
        self._before = None
        worked_until_s = self._clock()
        self._pause(stop, self.pause_s)
        self._resumed_s = self._clock()
        self.paused_s += self._resumed_s - worked_until_s
