"""How fast a drafter's weights leave the GPU and come back: park and unpark, by size.

    python -m bench.park --models small-drafter,qwen3-0.6b,qwen3-1.7b,qwen3-4b

The landlord is the product's, in this process; the tenant (`bench.park_peers`) is another process
made of the drafter's own lease, residency and region. *Park* runs from the request, answered by
QUIESCE at once, to the counted bytes, with an idle tenant; *with workspace* the tenant also gives
back what a pass had allocated. *Unpark* runs from the request to the moment the tenant's host saw
the last layer arrive; its ceiling is a plain pinned copy of the same bytes in the same process,
just before. *Spaced* unparks begin --pause-ms after the bytes were free, since a GPU scrubs freed
memory for about 3 ms; *back to back* ones begin at once. A third process, which takes no part,
counts the bytes too. The content is compared after every unpark. What would start after --budget-s
is left out, and named. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_options import aligned, commit, names
from bench.park_models import MODELS
from bench.peer import Peer
from kernels.ipc.physical import Physical, Transport, open_physical
from skim.log import configure
from target_svc.memory.landlord import Landlord
from target_svc.memory.policy import Rules
from target_svc.memory.settings import MemorySettings

PEERS = "bench.park_peers"
CEILING_COPIES = 10
OBSERVED_PARKS = 5
DRIFT_CYCLES = 50  # the first and the last of a long run are compared
PARK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Cycle:
    """One park and the unpark after it: milliseconds from each request; bytes that the park freed.

    `unmapped_ms` and `mapped_ms` are when the tenant had let go, and had mapped the new memory.
    """

    park_ms: float
    unmapped_ms: float
    freed_bytes: int
    mapped_ms: float
    first_ms: float
    last_ms: float
    same: bool


class Bench:
    """One run: options, landlord, observer, rows."""

    def __init__(self, options: argparse.Namespace, physical: Physical, socket: Path) -> None:
        self.options, self.physical, self.socket = options, physical, socket
        rules = Rules(policy="auto")
        settings = MemorySettings(socket, rules, park_timeout_s=PARK_TIMEOUT_S)
        self.landlord = Landlord(physical, settings)
        self.observer = Peer(options.peers, "observer", str(socket))
        self.began_s = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    async def run(self) -> None:
        """Every model, one after the other."""
        await self.landlord.start()
        try:
            for name in self.options.models:
                if self._in_time(name):
                    with Peer(self.options.peers, "tenant", str(self.socket), name) as tenant:
                        self.rows.append(await self._run_model(name, tenant))
                    await self.landlord.park(name)
        finally:
            await self.landlord.close()
            self.observer.close()

    async def _run_model(self, name: str, tenant: Peer) -> dict[str, Any]:
        row = {"model": name, **await _ask(tenant, "attach", timeout_s=180.0)}
        await self._until_resident(name)
        row["ceiling_gb_per_s"] = await _ask(tenant, "ceiling", times=CEILING_COPIES)
        await self._cycles(name, tenant, 3, 0.0)  # kernels of the host's path, once each
        row["observed_freed_bytes"] = await self._observe(name, tenant)
        spaced = await self._cycles(name, tenant, self.options.cycles, self.options.pause_ms * 1e-3)
        at_once = await self._cycles(name, tenant, self.options.cycles, 0.0)
        row["spaced"], row["back_to_back"] = (_unparks(cycles, row) for cycles in (spaced, at_once))
        row["park_ms"] = _spread([cycle.park_ms for cycle in spaced + at_once])
        row["unmapped_ms"] = _spread([cycle.unmapped_ms for cycle in spaced + at_once])
        row["freed_bytes"] = min(cycle.freed_bytes for cycle in spaced + at_once)
        row["same"] = all(cycle.same for cycle in spaced + at_once)
        if self.options.workspace_bytes:
            row["with_workspace"] = await self._with_workspace(name, tenant)
        if name == self.options.long_model and self.options.long_cycles:
            if self._in_time(f"{self.options.long_cycles} cycles of {name}"):
                row["long"] = await self._long(name, tenant)
        return row

    async def _until_resident(self, name: str) -> None:
        async for info in self.landlord.watch(name):
            if info.state == "RESIDENT":
                return

    async def _cycle(self, name: str, tenant: Peer, pause_s: float) -> Cycle:
        park_s = time.monotonic()
        report = await self.landlord.park(name)
        if pause_s:
            await asyncio.sleep(pause_s)
        begin_s = time.monotonic()
        async for _ in self.landlord.unpark(name):
            pass
        seen = await _ask(tenant, "hold", check=True)
        return Cycle(
            report.park_s * 1e3,
            (seen["unmapped_s"] - park_s) * 1e3,
            report.freed_bytes,
            (seen["mapped_s"] - begin_s) * 1e3,
            (seen["first_s"] - begin_s) * 1e3,
            (seen["last_s"] - begin_s) * 1e3,
            seen["same"],
        )

    async def _cycles(self, name: str, tenant: Peer, count: int, pause_s: float) -> list[Cycle]:
        return [await self._cycle(name, tenant, pause_s) for _ in range(count)]

    async def _observe(self, name: str, tenant: Peer) -> int:
        """Fewest bytes that the observer sees come free at one of a few parks."""
        seen = []
        for _ in range(OBSERVED_PARKS):
            before = await _ask(self.observer, "used_bytes")
            await self.landlord.park(name)
            seen.append(before - await _ask(self.observer, "used_bytes"))
            async for _ in self.landlord.unpark(name):
                pass
            await _ask(tenant, "hold", check=True)
        return int(min(seen))

    async def _with_workspace(self, name: str, tenant: Peer) -> dict[str, Any]:
        park_ms, given_back = [], 0
        for _ in range(self.options.workspace_parks):
            await _ask(tenant, "work", num_bytes=self.options.workspace_bytes)
            report = await self.landlord.park(name)
            park_ms.append(report.park_s * 1e3)
            given_back = report.workspace_bytes
            async for _ in self.landlord.unpark(name):
                pass
            await _ask(tenant, "hold", check=False)
        return {"workspace_bytes": given_back, "park_ms": _spread(park_ms)}

    async def _long(self, name: str, tenant: Peer) -> dict[str, Any]:
        """Many cycles: what grows, and whether the last take longer than the first."""
        before = await self._held(tenant)
        cycles: list[Cycle] = []
        until_s = self.began_s + self.options.budget_s
        while len(cycles) < self.options.long_cycles and time.monotonic() < until_s:
            cycles.append(await self._cycle(name, tenant, 0.0))
        after = await self._held(tenant)
        first, last = cycles[:DRIFT_CYCLES], cycles[-DRIFT_CYCLES:]
        return {
            "cycles": len(cycles),
            "grown": {what: after[what] - before[what] for what in before},
            "park_ms": _spread([cycle.park_ms for cycle in cycles]),
            "unpark_ms": _spread([cycle.last_ms for cycle in cycles]),
            "drift_ms": {
                "park": _median(last, "park_ms") - _median(first, "park_ms"),
                "unpark": _median(last, "last_ms") - _median(first, "last_ms"),
            },
            "freed_bytes": min(cycle.freed_bytes for cycle in cycles),
            "same": all(cycle.same for cycle in cycles),
        }

    async def _held(self, tenant: Peer) -> dict[str, int]:
        return {
            "used_bytes": await _ask(self.observer, "used_bytes"),
            "landlord_fds": len(os.listdir("/proc/self/fd")),
            "tenant_fds": await _ask(tenant, "fds"),
        }

    def _in_time(self, what: str) -> bool:
        in_time = time.monotonic() - self.began_s < self.options.budget_s
        if not in_time:
            self.left_out.append(what)
        return bool(in_time)

    def summary(self) -> dict[str, Any]:
        """Everything, for the JSON line."""
        return {
            "bench": "park",
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "gpu": self.physical.name,
            "transport": self.physical.transport,
            "pause_ms": self.options.pause_ms,
            "rows": self.rows,
            "left_out": self.left_out,
            "total_s": round(time.monotonic() - self.began_s, 1),
        }


async def _ask(peer: Peer, do: str, *, timeout_s: float = 60.0, **given: Any) -> Any:
    return await asyncio.wait_for(asyncio.wrap_future(peer.start(do, **given)), timeout_s)


def _unparks(cycles: Sequence[Cycle], row: dict[str, Any]) -> dict[str, Any]:
    """Times of some unparks, and the rate of their median against the plain copy's."""
    last = _spread([cycle.last_ms for cycle in cycles])
    rate = row["size_bytes"] / last["p50"] / 1e6
    return {
        "last_ms": last,
        "first_ms": _spread([cycle.first_ms for cycle in cycles]),
        "mapped_ms": _spread([cycle.mapped_ms for cycle in cycles]),
        "gb_per_s": rate,
        "of_ceiling": rate / row["ceiling_gb_per_s"],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile (nearest rank), maximum, and of how many."""
    ranked = sorted(values)
    p99 = ranked[max(0, -(-99 * len(ranked) // 100) - 1)]
    return {"p50": statistics.median(ranked), "p99": p99, "max": ranked[-1], "n": len(ranked)}


def _median(cycles: Sequence[Cycle], what: str) -> float:
    return statistics.median(getattr(cycle, what) for cycle in cycles)


def table(summary: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        ["model", "GB", "park p50", "p99", "max", "+workspace", "copy GB/s"]
        + [
            "unpark",
            "GB/s",
            "of copy",
            "mapped",
            "first layer",
            "at once",
            "of copy",
            "freed",
            "observed",
        ]
    ]
    for row in summary["rows"]:
        park, spaced, at_once = row["park_ms"], row["spaced"], row["back_to_back"]
        workspace = row.get("with_workspace")
        lines.append(
            [
                row["model"],
                f"{row['size_bytes'] / 1e9:.2f}",
                *(f"{park[which]:.2f}" for which in ("p50", "p99", "max")),
                f"{workspace['park_ms']['p50']:.2f}" if workspace else "-",
                f"{row['ceiling_gb_per_s']:.1f}",
                f"{spaced['last_ms']['p50']:.2f}",
                f"{spaced['gb_per_s']:.1f}",
                f"{spaced['of_ceiling']:.1%}",
                f"{spaced['mapped_ms']['p50']:.2f}",
                f"{spaced['first_ms']['p50']:.2f}",
                f"{at_once['last_ms']['p50']:.2f}",
                f"{at_once['of_ceiling']:.1%}",
                "all" if row["freed_bytes"] >= row["size_bytes"] else f"{row['freed_bytes']:,}",
                f"{row['observed_freed_bytes'] / row['size_bytes']:.1%}",
            ]
        )
    notes = [f"left out: {what}" for what in summary["left_out"]]
    for row in summary["rows"]:
        if long := row.get("long"):
            grown = ", ".join(f"{what} {by:+,}" for what, by in long["grown"].items())
            notes.append(
                f"{row['model']}, {long['cycles']:,} cycles back to back: park p50 "
                f"{long['park_ms']['p50']:.2f}, p99 {long['park_ms']['p99']:.2f}, max "
                f"{long['park_ms']['max']:.2f}; drift park {long['drift_ms']['park']:+.2f}, "
                f"unpark {long['drift_ms']['unpark']:+.2f}; grown: {grown}"
            )
        if not row["same"]:
            notes.append(f"{row['model']}: the weights were not the same after an unpark")
    head = f"{summary['gpu']}, {summary['transport']}, times in ms"
    return "\n".join([head, *aligned(lines), *notes])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.park",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", type=lambda text: names(text, MODELS), default=["qwen3-0.6b"])
    add("--cycles", type=int, default=50, help="spaced, and as many back to back")
    add("--pause-ms", type=float, default=10.0, help="from the free bytes to a spaced unpark")
    add("--long-model", choices=MODELS, default="qwen3-0.6b")
    add("--long-cycles", type=int, default=1_000, help="back to back; 0: none")
    add("--workspace-bytes", type=int, default=2 << 30, help="0: no such row")
    add("--workspace-parks", type=int, default=10)
    add("--transport", choices=("vmm_fd", "legacy_ipc"), default="vmm_fd")
    add("--budget-s", type=float, default=420.0, help="no row starts later than this")
    add("--json", action="store_true", help="the JSON line alone, no table")
    add("--peers", default=PEERS, help="module of the other processes; a test has its own")
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str] | None = None,
    physical_in: Callable[[Path, Transport], Physical] | None = None,
) -> int:
    """Measure, print the table, then one JSON object; 1 when content or bytes were wrong.

    Args:
        arguments: of the command line.
        physical_in: the GPU's memory, given the folder of the socket; None: the real GPU's.
    """
    options = parse(arguments)
    configure("bench", "warning")
    with tempfile.TemporaryDirectory(prefix="skim-park-") as folder:
        home = Path(folder)
        if physical_in is None:
            physical = open_physical(transport=options.transport)
        else:
            physical = physical_in(home, options.transport)
        bench = Bench(options, physical, home / "memory.sock")
        try:
            asyncio.run(bench.run())
        finally:
            physical.close()
    summary = bench.summary()
    if not options.json:
        print(table(summary))
    print(json.dumps(summary))
    return 0 if all(_sound(row) for row in summary["rows"]) else 1


def _sound(row: dict[str, Any]) -> bool:
    runs = [row, row["long"]] if "long" in row else [row]
    return all(run["same"] and run["freed_bytes"] >= row["size_bytes"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
