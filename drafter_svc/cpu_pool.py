"""A few threads that share out numbered pieces of work and stop when they are told to.

The CPU backend cuts every stage into pieces (a tile of a head, a chunk of rows). NumPy lets go of
the interpreter's lock inside each array operation, so plain threads keep every core busy, provided
that the BLAS below uses one thread each (`OPENBLAS_NUM_THREADS=1`, set before NumPy is imported).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from skim.errors import Cancelled


class WorkPool:
    """Runs one batch of pieces at a time on `num_threads` threads."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="drafter-cpu")

    def run(self, count: int, work: Callable[[int, int], None], stop: threading.Event) -> None:
        """Call `work(piece, worker)` once for each piece in [0, count), in rising order.

        Args:
            work: `worker` in [0, num_threads) names the thread, for scratch memory of its own.
            stop: looked at before each piece.
        Raises:
            Cancelled: `stop` was set before the last piece began. No thread is working any more.
            Exception: the first one that `work` raised; the pieces not yet begun are dropped.
        """
        pieces = itertools.count()  # next() is atomic under the interpreter's lock
        failed = threading.Event()

        def serve(worker: int) -> bool:
            while not failed.is_set():
                piece = next(pieces)
                if piece >= count:
                    return True
                if stop.is_set():
                    return False
                try:
                    work(piece, worker)
                except BaseException:
                    failed.set()
                    raise
            return True

        helpers = [self._threads.submit(serve, worker) for worker in range(self.num_threads)]
        # Every thread is waited for before anything is raised: none may touch the buffers later.
        problems = [helper.exception() for helper in helpers]
        for problem in problems:
            if problem is not None:
                raise problem
        if not all(helper.result() for helper in helpers):
            raise Cancelled("the scoring pass was stopped")

    def close(self) -> None:
        """Let the threads end; idempotent."""
        self._threads.shutdown(wait=True)
