"""The tables under an answer: where the time went, for one run or for two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table

# Stages in the order in which they usually run, and what happens in each. They overlap.
STAGES = {
    "upload_s": "upload",
    "queue_s": "queue",
    "tokenise_s": "tokenise (after the upload)",
    "score_s": "skim and score",
    "select_s": "  of it, select",
    "park_s": "park the drafter",
    "map_s": "map spans to tokens",
    "prefill_s": "prefill",
    "ttft_s": "time to first token",
    "decode_s": "decode",
    "unpark_s": "unpark the drafter",
    "total_s": "total",
}
EMPHASISED = "ttft_s"


def timing_table(
    runs: Mapping[str, Mapping[str, float]], above: Sequence[Sequence[RenderableType]] = ()
) -> Table:
    """Seconds by stage, a column for each run; stages that ran in none are left out.

    Args:
        runs: a title and the seconds of each stage, by the names of STAGES.
        above: rows that stand above the stages: a title, then a cell for each run.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in runs:
        table.add_column(title, justify="right", header_style="dim", min_width=10)
    for row in above:
        table.add_row(*row)
    for stage, title in STAGES.items():
        seconds = [run.get(stage, 0.0) for run in runs.values()]
        if any(seconds):
            cells = [format_seconds(value) if value else "-" for value in seconds]
            table.add_row(title, *cells, style="bold" if stage == EMPHASISED else None)
    return table


def format_seconds(seconds: float) -> str:
    """Seconds with three significant figures, in ms below one second."""
    if seconds >= 1.0:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.3g} ms"
