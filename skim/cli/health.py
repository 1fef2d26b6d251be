"""Ask a service whether it is ready, over the standard gRPC health protocol.

Used by the local stack from its own thread, hence blocking. A fresh connection each time: a kept
one would wait out its reconnect backoff when a service has just come back.
"""

from __future__ import annotations

from enum import StrEnum

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PROBE_TIMEOUT_S = 1.0


class Health(StrEnum):
    """What a probe found."""

    SERVING = "serving"
    NOT_SERVING = "not serving"
    UNREACHABLE = "unreachable"


def probe(address: str, service: str = "readiness", timeout_s: float = PROBE_TIMEOUT_S) -> Health:
    """Ask `address` for the health of `service`; waits at most `timeout_s`."""
    # A pool of its own: connections of the shared pool come with the backoff of earlier failures.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError:
            return Health.UNREACHABLE
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return Health.SERVING if serving else Health.NOT_SERVING
