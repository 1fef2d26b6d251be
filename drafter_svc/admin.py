"""The drafter's admin port: drain, configuration, and which model scores.

Called by operators and by `skim doctor`, on loopback by default. Health is NOT_SERVING while a swap
goes on. Refuses names that are not among the configured drafters.
"""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import grpc

from drafter_svc.config import DrafterSettings
from drafter_svc.host import DrafterHost
from skim import admin
from skim.rpc import RpcServer
from skim.v1 import admin_pb2

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class AdminServicer(admin.AdminServicer):
    """Answers AdminService for one host."""

    def __init__(self, settings: DrafterSettings, host: DrafterHost, server: RpcServer) -> None:
        super().__init__(settings, server)
        self._host = host

    async def LoadDrafter(
        self, request: admin_pb2.LoadDrafterRequest, context: Context
    ) -> admin_pb2.LoadDrafterResponse:
        """Make a model ready beside the one that scores."""
        begin_s = time.monotonic()
        drafter = await self._host.load(request.name)
        return admin_pb2.LoadDrafterResponse(
            size_bytes=drafter.backend.model.weight_bytes, load_s=time.monotonic() - begin_s
        )

    async def SwapDrafter(
        self, request: admin_pb2.SwapDrafterRequest, context: Context
    ) -> admin_pb2.SwapDrafterResponse:
        """Score with another model from now on."""
        previous, swap_s = await self._host.swap(request.name)
        return admin_pb2.SwapDrafterResponse(previous=previous, swap_s=swap_s)
