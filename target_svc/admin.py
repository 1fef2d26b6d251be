"""The target's admin port: drain, configuration, and the memory plane's place.

Called by operators and by `skim doctor`, on loopback by default. What this build has not it says in
a sentence: drafter models belong to the drafter's service, regions to a landlord.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from skim.errors import InvalidRequest, Unimplemented
from skim.rpc import RpcServer
from skim.v1 import admin_pb2, admin_pb2_grpc, memory_pb2, memory_pb2_grpc
from target_svc.config import TargetSettings

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

DEFAULT_GRACE_S, MAX_GRACE_S = 30.0, 3_600.0


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Answers AdminService for one target."""

    def __init__(self, settings: TargetSettings, server: RpcServer) -> None:
        self._settings = settings
        self._server = server

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> admin_pb2.DrainResponse:
        """Stop taking work, wait for what runs."""
        grace_s = request.grace_s if request.HasField("grace_s") else DEFAULT_GRACE_S
        if not 0.0 <= grace_s <= MAX_GRACE_S:
            raise InvalidRequest.field_value("grace_s", grace_s, f"in [0, {MAX_GRACE_S:g}]")
        return admin_pb2.DrainResponse(unfinished=await self._server.drain(grace_s))

    async def GetConfig(
        self, request: admin_pb2.GetConfigRequest, context: Context
    ) -> admin_pb2.GetConfigResponse:
        """Report the settings in force."""
        return admin_pb2.GetConfigResponse(settings=self._settings.describe())

    async def LoadDrafter(
        self, request: admin_pb2.LoadDrafterRequest, context: Context
    ) -> admin_pb2.LoadDrafterResponse:
        """Refuse: the drafter's service loads drafters."""
        raise Unimplemented("a target has no drafter models; ask the drafter's admin port")

    async def SwapDrafter(
        self, request: admin_pb2.SwapDrafterRequest, context: Context
    ) -> admin_pb2.SwapDrafterResponse:
        """Refuse: the drafter's service swaps drafters."""
        raise Unimplemented("a target has no drafter models; ask the drafter's admin port")


def _no_memory_plane() -> Unimplemented:
    return Unimplemented(
        "this target has no memory plane: drafter and target share no GPU",
        reason="NO_MEMORY_PLANE",
    )


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Answers MemoryService where no landlord runs."""

    async def ListRegions(
        self, request: memory_pb2.ListRegionsRequest, context: Context
    ) -> memory_pb2.ListRegionsResponse:
        """Refuse: no landlord."""
        raise _no_memory_plane()

    async def Park(
        self, request: memory_pb2.ParkRequest, context: Context
    ) -> memory_pb2.ParkResponse:
        """Refuse: no landlord."""
        raise _no_memory_plane()

    async def Unpark(
        self, request: memory_pb2.UnparkRequest, context: Context
    ) -> AsyncIterator[memory_pb2.UnparkResponse]:
        """Refuse: no landlord."""
        raise _no_memory_plane()
        yield  # makes it a stream

    async def WatchState(
        self, request: memory_pb2.WatchStateRequest, context: Context
    ) -> AsyncIterator[memory_pb2.WatchStateResponse]:
        """Refuse: no landlord."""
        raise _no_memory_plane()
        yield  # makes it a stream
