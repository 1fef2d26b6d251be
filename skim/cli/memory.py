"""`skim memory`: look at the regions of the memory plane, park and unpark them, watch them.

Blocking calls to MemoryService on the target's admin port, which listens on loopback by default.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from rich.table import Table

from skim.cli.admin import ANSWER_MARGIN_S, service_at
from skim.cli.output import Output
from skim.cli.tables import format_seconds
from skim.v1 import drafter_pb2, memory_pb2, memory_pb2_grpc

CALL_TIMEOUT_S = 10.0
PARK_MAX_S = 60.0  # the longest that a target lets a drafter take
UNPARK_TIMEOUT_S = 60.0


def run_regions(output: Output, address: str) -> int:
    """List the regions."""
    with memory_service(address) as service:
        answer = service.ListRegions(memory_pb2.ListRegionsRequest(), timeout=CALL_TIMEOUT_S)
    regions = [_facts(region) for region in answer.regions]
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "state", "generation", "bytes", "process", "model", "transport"):
        table.add_column(heading, header_style="dim")
    for region in regions:
        table.add_row(
            region["name"],
            region["state"],
            str(region["generation"]),
            f"{region['size_bytes']:,}",
            str(region["lease_pid"] or "-"),
            region["model_digest"][:12],
            region["transport"],
        )
    output.console.print(table if regions else "No drafter has connected yet.")
    output.json_line({"regions": regions})
    return 0


def run_park(
    output: Output, address: str, name: str, expect_generation: int, timeout_s: float | None
) -> int:
    """Free a region's device memory."""
    request = memory_pb2.ParkRequest(name=name, expect_generation=expect_generation)
    if timeout_s is not None:
        request.timeout_s = timeout_s
    with memory_service(address) as service:
        answer = service.Park(request, timeout=PARK_MAX_S + ANSWER_MARGIN_S)
    if answer.already_parked:
        output.console.print(f"{name} was parked already")
    else:
        output.console.print(
            f"{name} is parked: {answer.freed_bytes:,} bytes freed and counted "
            f"in {format_seconds(answer.park_s)}"
        )
    output.json_line(
        {
            "region": _facts(answer.region),
            "freed_bytes": answer.freed_bytes,
            "workspace_bytes": answer.workspace_bytes,
            "already_parked": answer.already_parked,
            "park_s": answer.park_s,
        }
    )
    return 0


def run_unpark(output: Output, address: str, name: str, expect_generation: int) -> int:
    """Bring a region back, and wait until all of it is there."""
    request = memory_pb2.UnparkRequest(name=name, expect_generation=expect_generation)
    with memory_service(address) as service:
        *_, last = service.Unpark(request, timeout=UNPARK_TIMEOUT_S)
    output.console.print(f"{name} is {_state(last.region)}, generation {last.region.generation}")
    output.json_line({"region": _facts(last.region), "copied_bytes": last.copied_bytes})
    return 0


def run_watch(output: Output, address: str, name: str) -> int:
    """Print each state of a region until it is gone, or the watcher leaves."""
    with memory_service(address) as service:
        for answer in service.WatchState(memory_pb2.WatchStateRequest(name=name)):
            region = _facts(answer.region)
            process = f", process {region['lease_pid']}" if region["lease_pid"] else ""
            output.console.print(f"{region['state']}, generation {region['generation']}{process}")
            output.json_line(region)
    return 0


def memory_service(address: str) -> AbstractContextManager[Any]:
    """MemoryService at an address; failures inside the body come out as Skim's errors."""
    return service_at(address, "target admin port", memory_pb2_grpc.MemoryServiceStub)


def _facts(region: memory_pb2.Region) -> dict[str, Any]:
    return {
        "name": region.name,
        "state": _state(region),
        "generation": region.generation,
        "size_bytes": region.size_bytes,
        "lease_pid": region.lease_pid,
        "model_digest": region.model_digest,
        "layout_digest": region.layout_digest,
        "device_uuid": region.device_uuid,
        "transport": region.transport,
    }


def _state(region: memory_pb2.Region) -> str:
    name: str = drafter_pb2.ResidencyState.Name(region.state)
    return name.removeprefix("RESIDENCY_STATE_")
