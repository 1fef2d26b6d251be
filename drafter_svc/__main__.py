"""The drafter's process: `python -m drafter_svc`, configured by `SKIM_DRAFTER_*`.

Binds its ports first (alive, not ready), then loads the model, then serves until SIGTERM, and
drains. A setting, a model or a port that cannot be used is one line on standard error and exit
status 2.
"""

from __future__ import annotations

import os

# One thread a matrix product, set before NumPy is imported: the pass has its own pool, and two
# pools on the same cores take turns waiting for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import asyncio
import sys
from typing import Any

from drafter_svc.admin import AdminServicer
from drafter_svc.config import DrafterSettings
from drafter_svc.cuda_lists import Planter
from drafter_svc.drafter import check_backend
from drafter_svc.host import DrafterHost
from drafter_svc.memory_plane import MemoryPlane
from drafter_svc.service import DrafterServicer
from kernels.device import Device
from skim.log import get_logger
from skim.process import run_service
from skim.rpc import RpcServer
from skim.v1 import admin_pb2, admin_pb2_grpc, drafter_pb2, drafter_pb2_grpc

log = get_logger()


def make_server(settings: DrafterSettings, host: DrafterHost) -> RpcServer:
    """Put the drafter's services on their two ports."""
    server = RpcServer(
        service_names=[drafter_pb2.DESCRIPTOR.services_by_name["DrafterService"].full_name],
        admin_service_names=[admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name],
        listen=settings.listen,
        admin_listen=settings.admin_listen,
    )
    host.on_serving = server.set_serving
    drafter_pb2_grpc.add_DrafterServiceServicer_to_server(DrafterServicer(host), server.data)
    admin = AdminServicer(settings, host, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server.admin)
    return server


def make_plane(
    settings: DrafterSettings, planted: Planter | None, device: Device | None
) -> MemoryPlane | None:
    """The memory plane that the settings name; None: weights have memory of their own.

    Raises:
        ConfigError: the settings ask for CUDA and it cannot be used.
    """
    why_cpu = None if device is not None else check_backend(settings)
    if settings.memory_socket is None:
        return None
    if why_cpu is not None:
        log.warning("memory_socket_unused", why_cpu=why_cpu)
        return None
    options: dict[str, Any] = {} if device is None else {"device": device, "warm_up_tokens": 0}
    return MemoryPlane(settings, planted=planted, **options)


async def serve(
    settings: DrafterSettings, planted: Planter | None = None, device: Device | None = None
) -> None:
    """Serve until told to stop.

    Args:
        planted: see `cuda_backend.CudaBackend`; benchmarks only.
        device: in the place of the first GPU, where the weights are in a memory plane; tests only.
    Raises:
        ConfigError: a port is in use, or the backend is not there.
        ModelFileError: the model cannot be used.
    """
    plane = make_plane(settings, planted, device)
    host = DrafterHost(settings, planted=planted, plane=plane)
    server = make_server(settings, host)
    server.catch_signals()
    await server.start()
    log.info("listening", port=server.port, admin_port=server.admin_port)
    loading = asyncio.create_task(host.start())
    loading.add_done_callback(lambda task: _stop_if_failed(task, server))
    try:
        await server.run_until_stopped(settings.grace_s)
    finally:
        loading.cancel()
        await host.close()
    if not loading.cancelled():
        await loading  # raises why the model could not be loaded


def _stop_if_failed(task: asyncio.Task[None], server: RpcServer) -> None:
    if not task.cancelled() and task.exception() is not None:
        server.request_stop()


if __name__ == "__main__":
    sys.exit(run_service("drafter_svc", __doc__, DrafterSettings, serve))
