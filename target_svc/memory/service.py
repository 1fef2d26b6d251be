"""MemoryService on the wire: people and probes look at regions, park them and bring them back.

On the target's admin port, over the landlord. Refuses all of it where no landlord runs, and values
out of range by the name of their field. With `admin.py` all that sees these generated messages.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from skim.errors import InvalidRequest, Unimplemented
from skim.v1 import memory_pb2, memory_pb2_grpc
from target_svc.memory.landlord import Landlord
from target_svc.memory.region import RegionInfo

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

MAX_PARK_TIMEOUT_S = 60.0


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Answers MemoryService; `landlord` None: there is no memory plane."""

    def __init__(self, landlord: Landlord | None) -> None:
        self._landlord = landlord

    async def ListRegions(
        self, request: memory_pb2.ListRegionsRequest, context: Context
    ) -> memory_pb2.ListRegionsResponse:
        """List the regions."""
        regions = self._require().regions()
        return memory_pb2.ListRegionsResponse(regions=[region_to_proto(info) for info in regions])

    async def Park(
        self, request: memory_pb2.ParkRequest, context: Context
    ) -> memory_pb2.ParkResponse:
        """Free a region's device memory."""
        timeout_s = request.timeout_s if request.HasField("timeout_s") else None
        if timeout_s is not None and not 0.0 < timeout_s <= MAX_PARK_TIMEOUT_S:
            allowed = f"in (0, {MAX_PARK_TIMEOUT_S:g}]"
            raise InvalidRequest.field_value("timeout_s", timeout_s, allowed)
        report = await self._require().park(
            request.name, expect_generation=request.expect_generation, timeout_s=timeout_s
        )
        return memory_pb2.ParkResponse(
            region=region_to_proto(report.info),
            freed_bytes=report.freed_bytes,
            already_parked=report.already_parked,
            park_s=report.park_s,
            workspace_bytes=report.workspace_bytes,
        )

    async def Unpark(
        self, request: memory_pb2.UnparkRequest, context: Context
    ) -> AsyncIterator[memory_pb2.UnparkResponse]:
        """Bring a region back, and say how far it is."""
        progress = self._require().unpark(request.name, expect_generation=request.expect_generation)
        async with aclosing(progress) as infos:
            async for info in infos:
                yield memory_pb2.UnparkResponse(
                    region=region_to_proto(info),
                    copied_bytes=info.copied_bytes,
                    layers_ready=info.layers_ready,
                )

    async def WatchState(
        self, request: memory_pb2.WatchStateRequest, context: Context
    ) -> AsyncIterator[memory_pb2.WatchStateResponse]:
        """Send a region's state now, and each that follows."""
        async with aclosing(self._require().watch(request.name)) as infos:
            told = None
            async for info in infos:
                region = region_to_proto(info)
                if region != told:  # the progress of a copy is no state
                    told = region
                    yield memory_pb2.WatchStateResponse(region=region)

    def _require(self) -> Landlord:
        if self._landlord is None:
            raise Unimplemented(
                "this target has no memory plane (memory_socket is not set): drafter and target "
                "share no GPU",
                reason="NO_MEMORY_PLANE",
            )
        return self._landlord


def region_to_proto(info: RegionInfo) -> memory_pb2.Region:
    """A region as its message."""
    return memory_pb2.Region(
        name=info.name,
        generation=info.generation,
        state=f"RESIDENCY_STATE_{info.state}",
        size_bytes=info.size_bytes,
        model_digest=info.model_digest,
        layout_digest=info.layout_digest,
        device_uuid=info.device_uuid,
        lease_pid=info.lease_pid,
        transport=info.transport,
    )
