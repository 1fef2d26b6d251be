"""The target's admin port: drain, configuration, and the memory plane's place.

Called by operators and by `skim doctor`, on loopback by default. What this build has not it says in
a sentence: drafter models belong to the drafter's service, regions to a landlord.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from skim import admin
from skim.errors import Unimplemented
from skim.rpc import RpcServer
from skim.v1 import memory_pb2, memory_pb2_grpc
from target_svc.config import TargetSettings

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class AdminServicer(admin.AdminServicer):
    """Answers AdminService for one target."""

    def __init__(self, settings: TargetSettings, server: RpcServer) -> None:
        super().__init__(
            settings, server, "a target has no drafter models; ask the drafter's admin port"
        )


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
