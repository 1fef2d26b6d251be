"""What a run of `bench.ttft` writes down, and what follows from it: rows, ratios, break-even.

Every sample is one JSON line the moment it is there (`Record`), so that a run that is killed loses
nothing; `summarise` makes the published rows of any number of such files. Pure but for the file.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_options import aligned
from skim.client_types import Answer

Event = dict[str, Any]

# In the order in which a request passes through them. `upload` ends with the last part at the
# gateway, `tokenise` is what the drafter (full: the target) had left to do then, `rest` is what no
# stage explains: wire, gateway, plan, waiting for the target's tokens, the first token's way back.
# What the target tokenises after the upload's end runs beside the drafter's stages.
STAGES = (
    "upload",
    "tokenise",
    "unpark",
    "queue",
    "score",
    "select",
    "map",
    "park",
    "prefill",
    "rest",
)
# What the client, the wire and the gateway add, tokenising included.
ADDED = ("upload", "tokenise", "rest")
STACK_EVENTS = ("models", "ballast", "starting", "stack", "region")
ROW_KEY = ("mode", "path", "lists", "keep", "tokens")


class Record:
    """Events of one run: to a file at once, in words to standard error, and kept."""

    def __init__(self, path: Path | None) -> None:
        self.events: list[Event] = []
        self._path = path

    def add(self, kind: str, **fields: Any) -> Event:
        """Note one event."""
        event: Event = {"kind": kind, **fields}
        self.events.append(event)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(event) + "\n")
        print(_words(event), file=sys.stderr, flush=True)
        return event


def read_records(paths: Iterable[Path]) -> list[Event]:
    """Read the events of files; a last line that was cut off is left out."""
    events: list[Event] = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events


def stages_of(answer: Answer, scored: Mapping[str, Any] | None) -> dict[str, float]:
    """Split the client's TTFT into `STAGES`.

    Args:
        answer: with the gateway's timings and the client's own TTFT.
        scored: the drafter's log line of the request; None: it was not scored.
    """
    timings = answer.finish.timings
    stages = {
        "upload": timings.upload_s,
        "tokenise": scored["tokenise_s"] if scored else timings.tokenise_s,
        "unpark": timings.unpark_s,
        "queue": timings.queue_s,
        "score": scored["forward_s"] if scored else 0.0,
        "select": scored["select_s"] if scored else 0.0,
        "map": timings.map_s,
        "park": timings.park_s,
        "prefill": timings.prefill_s,
    }
    return stages | {"rest": answer.finish.ttft_s - sum(stages.values())}


def summarise(events: Sequence[Event]) -> Event:
    """Make the rows of all samples, each with its ratio to plain llama.cpp at its length."""
    vanilla = {
        tokens: _spread([e["ttft_s"] for e in events if _is(e, "vanilla", tokens)])
        for tokens in sorted({e["tokens"] for e in events if e["kind"] == "vanilla"})
    }
    samples: dict[tuple[Any, ...], list[Event]] = {}
    for event in events:
        if event["kind"] == "sample":
            samples.setdefault(tuple(event[name] for name in ROW_KEY), []).append(event)
    rows = [_row(key, group, vanilla) for key, group in samples.items()]
    runs = [event for event in events if event["kind"] == "run"]
    return {
        "bench": "ttft",
        "runs": runs,
        "vanilla": [{"tokens": tokens, **spread} for tokens, spread in vanilla.items()],
        "rows": rows,
        "break_even": _break_evens(rows, vanilla),
        "left_out": [e["what"] for e in events if e["kind"] == "left_out"],
        "failed": [e for e in events if e["kind"] == "failed"],
        "stacks": [e for e in events if e["kind"] in STACK_EVENTS],
    }


def break_even(points: Sequence[tuple[int, float, float]]) -> Event | None:
    """Find the length from which skimming is the faster one.

    Args:
        points: (tokens, seconds skimmed, seconds in full), each length once.
    Returns:
        `tokens` and `bound`: `measured` (between two lengths, the ratio's logarithm taken as a line
        over that of the length), `at_most` (faster at all lengths, the shortest is given), `above`
        (slower at the longest); None without points.
    """
    ordered = sorted(points)
    if not ordered:
        return None
    logs = [(math.log(tokens), math.log(skim / full)) for tokens, skim, full in ordered]
    if logs[-1][1] > 0.0:
        return {"tokens": ordered[-1][0], "bound": "above"}
    for (low, low_ratio), (high, high_ratio) in reversed(list(zip(logs, logs[1:], strict=False))):
        if low_ratio > 0.0:
            share = low_ratio / (low_ratio - high_ratio)
            return {"tokens": round(math.exp(low + share * (high - low))), "bound": "measured"}
    return {"tokens": ordered[0][0], "bound": "at_most"}


def _break_evens(rows: Sequence[Event], vanilla: Mapping[int, Event]) -> list[Event]:
    """For each way of skimming: against a full prefill through the services, and plain."""
    full = {r["tokens"]: r["ttft_s"]["median"] for r in rows if r["path"] == "full"}
    plain = {tokens: spread["median"] for tokens, spread in vanilla.items()}
    found = []
    for way in dict.fromkeys((r["mode"], r["lists"], r["keep"]) for r in rows if r["keep"]):
        mine = {
            r["tokens"]: r["ttft_s"]["median"]
            for r in rows
            if (r["mode"], r["lists"], r["keep"]) == way
        }
        for against, other in (("full through the services", full), ("llama.cpp", plain)):
            points = [(n, mine[n], other[n]) for n in mine if n in other]
            if (result := break_even(points)) is not None:
                names = dict(zip(("mode", "lists", "keep"), way, strict=True))
                found.append({**names, "against": against, **result})
    return found


def _row(key: tuple[Any, ...], group: Sequence[Event], vanilla: Mapping[int, Event]) -> Event:
    row: Event = dict(zip(ROW_KEY, key, strict=True))
    row["samples"] = len(group)
    row["ttft_s"] = _spread([event["ttft_s"] for event in group])
    row["stages_s"] = {
        stage: statistics.median(event["stages_s"][stage] for event in group) for stage in STAGES
    }
    row["added_s"] = statistics.median(
        sum(event["stages_s"][stage] for stage in ADDED) for event in group
    )
    row["target_tokenise_s"] = statistics.median(event["target_tokenise_s"] for event in group)
    for name in ("kept_tokens", "density", "prompt_bytes"):
        row[name] = statistics.median(event[name] for event in group)
    row["kept_share"] = row["kept_tokens"] / row["tokens"]
    row["forced_only"] = any(event["forced_only"] for event in group)
    plain = vanilla.get(row["tokens"])
    row["times_faster"] = plain["median"] / row["ttft_s"]["median"] if plain else None
    return row


def _spread(values: Sequence[float]) -> Event:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def _is(event: Event, kind: str, tokens: int) -> bool:
    return event["kind"] == kind and bool(event["tokens"] == tokens)


def label(row: Mapping[str, Any]) -> str:
    """A row's name for people."""
    words = [str(row["mode"]), f"{row['tokens']:,}", str(row["path"])]
    if row["path"] == "skim":
        words += [str(row["lists"]), f"keep {row['keep']}"]
    return " ".join(words)


def table(summary: dict[str, Any]) -> str:
    """The figures for people: milliseconds but where a head says seconds; `added` is `ADDED`'s."""
    head = ["mode", "tokens", "lists", "keep", "kept", "density", "TTFT s", "min", "max", "n"]
    lines = [[*head, "x llama.cpp", "added", *STAGES, "(target tokenises)"]]
    for row in summary["rows"]:
        ttft = row["ttft_s"]
        ratio = row["times_faster"]
        lines.append(
            [
                row["mode"],
                f"{row['tokens']:,}",
                row["lists"] or row["path"],
                "-" if row["keep"] is None else f"{row['keep']:g}",
                f"{row['kept_share']:.4f}",
                f"{row['density']:.3f}",
                *(f"{ttft[name]:.3f}" for name in ("median", "min", "max")),
                str(ttft["n"]),
                f"{ratio:.1f}" if ratio else "-",
                f"{row['added_s'] * 1e3:.0f}",
                *(f"{row['stages_s'][stage] * 1e3:.0f}" for stage in STAGES),
                f"{row['target_tokenise_s'] * 1e3:.0f}",
            ]
        )
    for row in summary["vanilla"]:
        cells = ["llama.cpp", f"{row['tokens']:,}", "full", "-", "1.0000", "-"]
        cells += [f"{row[name]:.3f}" for name in ("median", "min", "max")] + [str(row["n"])]
        lines.append(cells + ["-"] * (len(lines[0]) - len(cells)))
    notes = [
        f"break-even, {found['mode']}, {found['lists']}, keep {found['keep']}, against "
        f"{found['against']}: {found['tokens']:,} tokens ({found['bound']})"
        for found in summary["break_even"]
    ]
    notes += [f"left out: {what}" for what in summary["left_out"]]
    notes += [f"failed: {event['what']}: {event['error']}" for event in summary["failed"]]
    return "\n".join([*aligned(lines), *notes])


def _words(event: Event) -> str:
    match event["kind"]:
        case "sample":
            stages = " ".join(
                f"{name} {seconds * 1e3:.0f}"
                for name, seconds in event["stages_s"].items()
                if abs(seconds) >= 5e-4
            )
            return f"{label(event)}: {event['ttft_s']:.3f} s (ms: {stages})"
        case "vanilla":
            return f"llama.cpp {event['tokens']:,}: {event['ttft_s']:.3f} s"
        case "warm_up":
            return f"(warm-up) {label(event)}: {event['ttft_s']:.3f} s"
        case kind:
            rest = {name: value for name, value in event.items() if name != "kind"}
            return f"{kind}: {json.dumps(rest)}"
