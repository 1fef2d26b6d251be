"""The target's service process: `python -m target_svc`, configured by `SKIM_TARGET_*`.

Binds its ports first (alive, not ready), then loads the model, then serves until SIGTERM, and
drains. A setting, a model or a port that cannot be used is one line on standard error and exit
status 2; an engine that dies for good is status 1, so that a supervisor starts the whole anew.
"""

from __future__ import annotations

import asyncio
import sys

from kernels.ipc.physical import Physical
from skim.log import get_logger
from skim.process import run_service
from skim.rpc import RpcServer
from skim.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    memory_pb2,
    memory_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
)
from target_svc.admin import AdminServicer
from target_svc.config import TargetSettings
from target_svc.memory.service import MemoryServicer
from target_svc.service import TargetServicer
from target_svc.target import Target, TargetModel

log = get_logger()


def make_server(settings: TargetSettings, target: Target) -> RpcServer:
    """Put the target's services on their two ports, and tie health to the engine."""
    server = RpcServer(
        service_names=[target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name],
        admin_service_names=[
            admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
            memory_pb2.DESCRIPTOR.services_by_name["MemoryService"].full_name,
        ],
        listen=settings.listen,
        admin_listen=settings.admin_listen,
    )
    target_pb2_grpc.add_TargetServiceServicer_to_server(TargetServicer(target), server.data)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(settings, server), server.admin)
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(
        MemoryServicer(target.landlord), server.admin
    )
    changes: set[asyncio.Task[None]] = set()

    def on_health(serving: bool) -> None:
        change = asyncio.create_task(server.set_serving(serving))
        changes.add(change)
        change.add_done_callback(changes.discard)

    target.on_health = on_health
    return server


async def serve(settings: TargetSettings, physical: Physical | None = None) -> None:
    """Serve until told to stop.

    Args:
        physical: in the place of the first GPU, where drafters share its memory; tests only.
    Raises:
        ConfigError: a port is in use.
        ModelFileError: the model cannot be opened.
        EngineFault: the engine died for good.
    """
    target = Target(settings, TargetModel(settings.model), physical=physical)
    server = make_server(settings, target)
    server.catch_signals()
    await server.start()
    log.info("listening", port=server.port, admin_port=server.admin_port)
    failures: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        server.request_stop()

    def on_loaded(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_failure(error)

    target.on_failure = on_failure
    loading = asyncio.create_task(target.start())
    loading.add_done_callback(on_loaded)
    try:
        await server.run_until_stopped(settings.grace_s)
    finally:
        loading.cancel()
        await target.close()
    if failures:
        raise failures[0]


if __name__ == "__main__":
    sys.exit(run_service("target_svc", __doc__, TargetSettings, serve))
