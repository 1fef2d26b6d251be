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
from skim.errors import InvalidRequest
from skim.rpc import RpcServer
from skim.v1 import admin_pb2, admin_pb2_grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

DEFAULT_GRACE_S, MAX_GRACE_S = 30.0, 3_600.0


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Answers AdminService for one host."""

    def __init__(self, settings: DrafterSettings, host: DrafterHost, server: RpcServer) -> None:
        self._settings = settings
        self._host = host
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
