"""Progress bars for the stages of a request: upload, score, prefill.

Drawn by rich while a person watches a terminal, nothing elsewhere. Bars appear when their stage
begins and vanish when the answer starts, so that what stays on the screen is the answer.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

# Stage names as the client gives them, and what to call them. Tokenising overlaps the upload and
# a bar for it would only flicker.
TITLES = {
    "upload": "upload (bytes)",
    "queue": "waiting",
    "score": "skim (layers)",
    "prefill": "prefill (tokens)",
}


class StageBars:
    """Bars of one request; a context manager. `close` may be called early and twice."""

    def __init__(self, console: Console, *, shown: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not shown,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is; `total` 0 is not known yet."""
        title = TITLES.get(stage)
        if title is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(title, total=total or None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)

    def close(self) -> None:
        """Take the bars away."""
        self._progress.stop()
