"""The gateway's process: `python -m gateway`, configured by `SKIM_GATEWAY_*`.

Binds its ports (alive, not ready), watches the services behind it, is ready while the target is,
and drains at SIGTERM. A setting or a port that cannot be used is one line on standard error and
exit status 2.
"""

from __future__ import annotations

import asyncio
import sys

from gateway.admin import AdminServicer
from gateway.config import GatewaySettings
from gateway.peers import Peers
from gateway.service import GatewayServicer
from skim.log import get_logger
from skim.process import run_service
from skim.rpc import RpcServer
from skim.v1 import admin_pb2, admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc


class Gateway:
    """One gateway: its server, its servicer and its peers, started and closed together.

    Raises:
        ConfigError: the token cannot be read.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.peers = Peers(
            settings.target, settings.drafter_addresses(), settings.health_interval_s
        )
        self.servicer = GatewayServicer(settings, self.peers)
        self.server = RpcServer(
            service_names=[gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name],
            admin_service_names=[admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name],
            listen=settings.listen,
            admin_listen=settings.admin_listen,
        )
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self.servicer, self.server.data)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(settings, self.server), self.server.admin
        )
        self._readiness: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, and begin to watch the peers.

        Raises:
            ConfigError: a port is in use.
        """
        await self.server.start()
        self.peers.start()
        self._readiness = asyncio.create_task(self._follow_target())

    async def close(self) -> None:
        """Stop serving at once."""
        if self._readiness is not None:
            self._readiness.cancel()
            await asyncio.gather(self._readiness, return_exceptions=True)
        await self.server.stop()
        await self.peers.close()

    async def _follow_target(self) -> None:
        """Be ready while the target is."""
        serving = False
        while True:
            await self.peers.target.until(not serving)
            serving = not serving
            await self.server.set_serving(serving)


async def serve(settings: GatewaySettings) -> None:
    """Serve until told to stop."""
    gateway = Gateway(settings)
    gateway.server.catch_signals()
    await gateway.start()
    get_logger().info("listening", port=gateway.server.port, admin_port=gateway.server.admin_port)
    try:
        await gateway.server.run_until_stopped(settings.grace_s)
    finally:
        await gateway.close()


if __name__ == "__main__":
    sys.exit(run_service("gateway", __doc__, GatewaySettings, serve))
