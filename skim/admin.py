"""The part of the admin port that every service answers alike: drain and configuration.

Called by operators, on loopback by default. Refuses to load or swap drafter models; the drafter's
service, which can, overrides those two.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc

from skim.config import Settings
from skim.errors import InvalidRequest, Unimplemented
from skim.rpc import RpcServer
from skim.v1 import admin_pb2, admin_pb2_grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

DEFAULT_GRACE_S, MAX_GRACE_S = 30.0, 3_600.0


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Answers AdminService for one service.

    Args:
        holds_no_models: what is said to a caller that wants drafter models loaded or swapped.
    """

    def __init__(self, settings: Settings, server: RpcServer, holds_no_models: str = "") -> None:
        self._settings = settings
        self._server = server
        self._holds_no_models = holds_no_models

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
        """Report the settings in force, secrets left out."""
        return admin_pb2.GetConfigResponse(settings=self._settings.describe())

    async def LoadDrafter(
        self, request: admin_pb2.LoadDrafterRequest, context: Context
    ) -> admin_pb2.LoadDrafterResponse:
        """Refuse: drafters load their own models."""
        raise Unimplemented(self._holds_no_models)

    async def SwapDrafter(
        self, request: admin_pb2.SwapDrafterRequest, context: Context
    ) -> admin_pb2.SwapDrafterResponse:
        """Refuse: drafters swap their own models."""
        raise Unimplemented(self._holds_no_models)
