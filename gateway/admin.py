"""The gateway's admin port: drain and configuration, and no models."""

from __future__ import annotations

from gateway.config import GatewaySettings
from skim import admin
from skim.rpc import RpcServer


class AdminServicer(admin.AdminServicer):
    """Answers AdminService for one gateway."""

    def __init__(self, settings: GatewaySettings, server: RpcServer) -> None:
        super().__init__(
            settings, server, "a gateway holds no models; ask the drafter's admin port"
        )
