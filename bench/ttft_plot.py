"""Draw what `bench.ttft` measured: the stages of a first token, stacked, beside plain llama.cpp.

    python -m bench.ttft_plot a.jsonl b.jsonl --out docs/ttft.svg

One bar for each length and system; ours again in a panel of a larger scale, since a full prefill is
twenty times as long as what is to be seen. matplotlib is a package of the
benchmarks alone. Refuses records without a row of the wanted keep ratio and lists.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.ttft_record import STAGES, read_records, summarise

# Stages that are too short to be seen are drawn as one.
SHORT = ("unpark", "queue", "select", "map", "park")
COLOURS = {
    "upload": "#8da0cb",
    "tokenise": "#66c2a5",
    "score": "#fc8d62",
    "queue, park, map, select, unpark": "#b3b3b3",
    "prefill": "#386cb0",
    "wire, gateway, first token": "#e5c494",
    "llama.cpp, full prefill": "#444444",
}


def grouped(stages_s: Mapping[str, float]) -> dict[str, float]:
    """Stages as they are drawn, seconds by name in `COLOURS`."""
    drawn = {stage: stages_s[stage] for stage in STAGES if stage not in (*SHORT, "rest")}
    drawn["queue, park, map, select, unpark"] = sum(stages_s[stage] for stage in SHORT)
    drawn["wire, gateway, first token"] = stages_s["rest"]
    return {name: max(0.0, drawn[name]) for name in COLOURS if name in drawn}


def draw(summary: Mapping[str, Any], *, lists: str, keep: float) -> Figure:
    """Both systems at every length that both were measured at.

    Raises:
        ValueError: there is none.
    """
    plain = {row["tokens"]: row["ttft_s"] for row in _vanilla(summary)}
    ours = [
        row
        for row in summary["rows"]
        if (row["lists"], row["keep"]) == (lists, keep) and row["tokens"] in plain
    ]
    if not ours:
        raise ValueError(f"no row of {lists} at keep {keep} beside llama.cpp's")
    modes = list(dict.fromkeys(row["mode"] for row in ours))
    lengths = sorted({row["tokens"] for row in ours})
    num_bars = len(ours) + sum(row["mode"] == modes[0] for row in ours)
    figure = Figure(figsize=(9.0, 1.1 + 0.3 * num_bars), layout="constrained")
    both, close = figure.subplots(1, 2, sharey=True)
    bars = [
        (f"{tokens:,} {mode}", row)
        for tokens in reversed(lengths)
        for mode in reversed(modes)
        for row in ours
        if (row["tokens"], row["mode"]) == (tokens, mode)
    ]
    labels: list[str] = []
    for name, row in bars:
        _stack(both, len(labels), row)
        _stack(close, len(labels), row)
        labels.append(f"{name}, {row['times_faster']:.1f}x")
        if row["mode"] == modes[0]:
            seconds = plain[row["tokens"]]["median"]
            both.barh(len(labels), seconds, color=COLOURS["llama.cpp, full prefill"])
            both.text(seconds, len(labels), f" {seconds:.2f} s", va="center", fontsize=8)
            labels.append(f"{row['tokens']:,} llama.cpp")
    for axes, title in ((both, "seconds to the first token"), (close, "ours, enlarged")):
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    both.set_xlim(right=1.2 * max(plain[tokens]["median"] for tokens in lengths))
    close.set_xlim(right=1.2 * max(row["ttft_s"]["median"] for row in ours))
    handles = [matplotlib.patches.Patch(color=colour, label=n) for n, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _vanilla(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"tokens": row["tokens"], "ttft_s": row} for row in summary["vanilla"]]


def _stack(axes: Axes, place: int, row: Mapping[str, Any]) -> None:
    """One bar, stage after stage."""
    left = 0.0
    for name, seconds in grouped(row["stages_s"]).items():
        axes.barh(place, seconds, left=left, color=COLOURS[name])
        left += seconds
    axes.text(left, place, f" {row['ttft_s']['median']:.2f} s", va="center", fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the records, write the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.ttft_plot", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help=".svg, .png, .pdf")
    parser.add_argument("--lists", default="planted 0.05")
    parser.add_argument("--keep", type=float, default=0.05)
    options = parser.parse_args(arguments)
    summary = summarise(read_records(options.records))
    draw(summary, lists=options.lists, keep=options.keep).savefig(options.out, dpi=160)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
