"""`skim drain` and `skim drafters swap`: calls to the services' admin ports.

Admin ports listen on loopback by default, so this runs where the services run. Blocking calls:
there is nothing to do meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc

from skim.cli.output import EXIT_FAILED, Output
from skim.errors import InvalidRequest, Unavailable
from skim.rpc_errors import from_rpc_error
from skim.v1 import admin_pb2, admin_pb2_grpc

# A drain may wait this much longer than its grace before we call the service gone.
ANSWER_MARGIN_S = 10.0
SWAP_TIMEOUT_S = 600.0


def admin_service(address: str, who: str) -> AbstractContextManager[Any]:
    """AdminService at an address; failures inside the body come out as Skim's errors."""
    return service_at(address, who, admin_pb2_grpc.AdminServiceStub)


@contextmanager
def service_at(address: str, who: str, stub: Callable[[grpc.Channel], Any]) -> Iterator[Any]:
    """A service of an admin port; failures inside the body come out as Skim's errors."""
    with grpc.insecure_channel(address) as channel:
        try:
            yield stub(channel)
        except grpc.RpcError as failure:
            error = from_rpc_error(failure)
            # A service that answers says why in `ErrorInfo`; gRPC's own failures have none.
            if isinstance(error, Unavailable) and error.reason == Unavailable.default_reason:
                raise Unavailable(
                    f"no {who} answers at {address}", reason="SERVICE_UNREACHABLE", got=address
                ) from None
            raise error from None


def run_drain(output: Output, addresses: dict[str, str], grace_s: float) -> int:
    """Drain services one after the other; exit code 1 when work was left unfinished."""
    if not 0 <= grace_s <= 3600:
        raise InvalidRequest.field_value("grace_s", grace_s, "in [0, 3600]")
    unfinished: dict[str, int] = {}
    for name, address in addresses.items():
        with admin_service(address, f"{name} admin port") as service:
            request = admin_pb2.DrainRequest(grace_s=grace_s)
            answer = service.Drain(request, timeout=grace_s + ANSWER_MARGIN_S)
        unfinished[name] = answer.unfinished
        left = f"{answer.unfinished} unfinished" if answer.unfinished else "idle"
        output.console.print(f"{name}: drained, {left}")
    output.json_line({"unfinished": unfinished})
    return EXIT_FAILED if any(unfinished.values()) else 0


def run_swap(output: Output, address: str, name: str) -> int:
    """Make a drafter service score with another model from now on."""
    with admin_service(address, "drafter admin port") as service:
        request = admin_pb2.SwapDrafterRequest(name=name)
        answer = service.SwapDrafter(request, timeout=SWAP_TIMEOUT_S)
    output.console.print(
        f"Swapped {answer.previous} for {name}; without service for {answer.swap_s:.2f} s"
    )
    output.json_line({"previous": answer.previous, "name": name, "swap_s": answer.swap_s})
    return 0
