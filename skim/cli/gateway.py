"""How the commands reach a gateway: one that runs already, or a stack of their own.

Blocking, through `skim.client.Client`. A gateway that is not there becomes one error that says how
to start it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from skim.cli.output import Output
from skim.cli.ports import DEFAULT_BASE_PORT
from skim.cli.service_process import ServiceState, Status
from skim.cli.stack import LocalStack
from skim.cli.stack_plan import StackOptions
from skim.client import Client
from skim.client_types import Answer, Event, Gathered
from skim.errors import Unavailable

DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_BASE_PORT}"
# A stack of one command has nobody else's requests to finish.
LOCAL_GRACE_S = 5.0
# A gateway is ready with its target alone; its drafters are ready too, so it hears of them at once.
DRAFTERS_KNOWN_S = 5.0


@dataclass(frozen=True)
class GatewayOptions:
    """Where the gateway is and how to call it.

    Attributes:
        address: `host:port` or `unix:/path`.
        token: bearer token; None: none is sent.
        timeout_s: seconds for each call; None: no limit.
        local: start services of our own instead, and stop them at the end.
        stack: what to start then.
    """

    address: str = DEFAULT_ADDRESS
    token: str | None = None
    timeout_s: float | None = None
    local: bool = False
    stack: StackOptions = StackOptions(base_port=0, grace_s=LOCAL_GRACE_S)


@contextmanager
def open_gateway(output: Output, options: GatewayOptions) -> Iterator[Client]:
    """A client of the gateway; failures to reach it inside the body come out as one clear error."""
    if options.local:
        with local_gateway(output, options.stack) as (address, _):
            with Client(address, deadline_s=options.timeout_s) as client:
                yield client
        return
    try:
        with Client(options.address, token=options.token, deadline_s=options.timeout_s) as client:
            yield client
    except Unavailable as error:
        # A gateway that answers says why in `ErrorInfo`; gRPC's own failures have no reason.
        if error.reason != Unavailable.default_reason:
            raise
        raise Unavailable(
            f"no gateway answers at {options.address}",
            reason="GATEWAY_UNREACHABLE",
            field="gateway",
            got=options.address,
        ) from None


@contextmanager
def local_gateway(output: Output, options: StackOptions) -> Iterator[tuple[str, LocalStack]]:
    """Start the services for the time of the body; gives the gateway's address and the stack."""
    with output.console.status("Starting the services …") as status:

        def on_change(state: ServiceState) -> None:
            status.update(f"{state.name}: {state.status} …")
            if state.status in (Status.RESTARTING, Status.FAILED):
                line = f"{state.name}: {state.status} {state.detail}"
                output.console.print(line, style="yellow", markup=False)

        stack = LocalStack(options, on_change=on_change)
        if stack.sharing.line:
            output.console.print(stack.sharing.line, style="dim", soft_wrap=True, markup=False)
        try:
            stack.start()
            _await_drafters(stack.gateway_address)
            status.stop()
            yield stack.gateway_address, stack
        finally:
            status.start()
            stack.stop()


def _await_drafters(address: str) -> None:
    """Wait until the gateway has heard from its drafters; without them it would not skim."""
    deadline = time.monotonic() + DRAFTERS_KNOWN_S
    with Client(address, deadline_s=DRAFTERS_KNOWN_S) as client:
        while not all(model.serving for model in client.models().models):
            if time.monotonic() > deadline:
                return  # the answer will say that no drafter serves
            time.sleep(0.02)


def gather(events: Iterable[Event], on_event: Callable[[Event], None]) -> Answer:
    """Read the events to the end, show each, and return the answer they make."""
    gathered = Gathered()
    for event in events:
        on_event(event)
        gathered.add(event)
    return gathered.answer()
