"""The three services on this machine, supervised: what `skim up`, `ask --local` and `demo` run.

    with LocalStack(StackOptions(base_port=0)) as stack:
        client = Client(stack.gateway_address)

One thread starts every process and lives until the last one is gone, for the kernel ties a child's
life to the thread that started it. Start order: target, drafters, gateway, each ready before the
next; stop order the reverse, so that the edge drains first. A crash after the start is answered by
a restart with a growing pause. Refuses ports that are in use and models that are not there before
any process is started.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from skim.cli.ports import require_free
from skim.cli.service_process import ServiceProcess, ServiceState, Status
from skim.cli.shared_gpu import Sharing, plan_sharing
from skim.cli.stack_plan import ServicePlan, StackOptions, plan_stack
from skim.errors import Cancelled, DeadlineExceeded, NotFound

TICK_S = 0.05
PROBE_EVERY_S = 1.0
# After its grace a service gets this long to close sockets and files before it is killed.
EXIT_MARGIN_S = 5.0

OnChange = Callable[[ServiceState], None]


class LocalStack:
    """Target, drafters and gateway as supervised child processes; a context manager.

    Args:
        options: models, ports, logs.
        on_change: called from the supervising thread whenever a service's state changes.
        plans: what to run instead of what `plan_stack` and `plan_sharing` make of the options;
            benchmarks put their own entry points in.

    Attributes:
        sharing: whether target and drafters share a GPU's memory; for people, its `line`.
    """

    def __init__(
        self,
        options: StackOptions | None = None,
        on_change: OnChange | None = None,
        *,
        plans: Sequence[ServicePlan] | None = None,
    ) -> None:
        self.options = options or StackOptions()
        self.sharing = Sharing()
        if plans is None:
            plans = plan_stack(self.options)
            self.sharing = plan_sharing(self.options)
        self.plans = self.sharing.apply(plans)
        self._services = {plan.name: ServiceProcess(plan) for plan in self.plans}
        self._on_change = on_change or (lambda state: None)
        self._restart_at_s: dict[str, float] = {}
        self._changed = threading.Condition()
        self._up = threading.Event()
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="stack-supervisor", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def gateway_address(self) -> str:
        """`host:port` of GatewayService."""
        return self.address("gateway")

    @property
    def log_dir(self) -> str:
        """Folder of the services' logs."""
        return str(self.plans[0].log_path.parent)

    def address(self, name: str, *, admin: bool = False) -> str:
        """`host:port` of a service: `target`, `drafter`, `drafter-2`, …, `gateway`."""
        plan = self._service(name).plan
        return plan.admin_address if admin else plan.address

    def states(self) -> list[ServiceState]:
        """State of each service, in start order."""
        return [service.state() for service in self._services.values()]

    def pid(self, name: str) -> int | None:
        """Process id of a service while it runs."""
        return self._service(name).pid

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a service's process, as a crash would; the stack restarts it."""
        pid = self._service(name).pid
        if pid is not None:
            os.kill(pid, number)

    def start(self) -> None:
        """Start everything and wait until all are ready.

        Raises:
            ConfigError: a port is in use, or a service refused its settings or its model.
            DeadlineExceeded: one was not ready within `start_timeout_s`.
            EngineFault: one died without saying why; its log is named.
        """
        self.launch()
        try:
            while not self.is_up():
                self._up.wait()
        except BaseException:  # also ctrl-C while it starts
            self.stop()
            raise

    def launch(self) -> None:
        """Begin to start everything and return at once; `is_up` tells how it went."""
        for plan in self.plans:
            require_free([(plan.name, plan.address), (f"{plan.name} admin", plan.admin_address)])
        self._thread.start()

    def is_up(self) -> bool:
        """Tell whether all services have been ready; raises as `start` does if one failed."""
        if self._failure:
            raise self._failure
        return self._up.is_set()

    def stop(self) -> None:
        """Drain and stop: gateway, drafters, target. Returns when all are gone."""
        self.request_stop()
        if self._thread.is_alive():
            self._thread.join()
        self.sharing.cleanup()

    def request_stop(self, *, hurry: bool = False) -> None:
        """Begin to stop and return at once; with `hurry`, kill what is still there."""
        if hurry:
            self._hurry.set()
        self._stop.set()

    def is_gone(self) -> bool:
        """Tell whether no process of this stack is left."""
        return not self._thread.is_alive()

    def wait_for(self, name: str, status: Status, *, restarts: int, timeout_s: float) -> None:
        """Wait until a service that was restarted at least `restarts` times has a status.

        Raises:
            DeadlineExceeded: it did not happen in time.
        """
        service = self._service(name)
        with self._changed:
            done = self._changed.wait_for(
                lambda: service.restarts >= restarts and service.status is status, timeout_s
            )
        if not done:
            raise DeadlineExceeded(
                f"the {name} is {service.status} after {timeout_s:g} s, not {status}"
            )

    def _service(self, name: str) -> ServiceProcess:
        if name not in self._services:
            raise NotFound(
                f"no service {name!r} in this stack", got=name, allowed=", ".join(self._services)
            )
        return self._services[name]

    def _run(self) -> None:
        try:
            for service in self._services.values():
                self._bring_up(service)
            self._up.set()
            self._supervise()
        except Exception as error:  # raised again by `start`, in the caller's thread
            self._failure = error
        finally:
            self._up.set()
            self._bring_down()

    def _bring_up(self, service: ServiceProcess) -> None:
        service.spawn()
        self._tell(service)
        deadline = time.monotonic() + self.options.start_timeout_s
        while not (service.look() and service.status is Status.READY):
            if service.exit_code() is not None:
                service.status = Status.FAILED
                self._tell(service)
                raise service.failure()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"the {service.plan.name} was not ready within "
                    f"{self.options.start_timeout_s:g} s; its log: {service.plan.log_path}"
                )
            if self._stop.wait(TICK_S):
                raise Cancelled("stopped while the services were starting")
        self._tell(service)

    def _supervise(self) -> None:
        next_probe_s = 0.0
        while not self._stop.wait(TICK_S):
            now = time.monotonic()
            probing = now >= next_probe_s
            for name, service in self._services.items():
                if name in self._restart_at_s:
                    self._restart_when_due(name, service, now)
                elif service.exit_code() is not None:
                    self._plan_restart(name, service, now)
                elif (probing or service.status is not Status.READY) and service.look():
                    self._tell(service)
            next_probe_s = now + PROBE_EVERY_S if probing else next_probe_s

    def _plan_restart(self, name: str, service: ServiceProcess, now: float) -> None:
        pause_s = service.backoff_s()
        service.status = Status.RESTARTING
        service.detail = f"{service.died_as()}; starts again in {pause_s:g} s"
        self._restart_at_s[name] = now + pause_s
        self._tell(service)

    def _restart_when_due(self, name: str, service: ServiceProcess, now: float) -> None:
        if now >= self._restart_at_s[name]:
            del self._restart_at_s[name]
            service.spawn()
            self._tell(service)

    def _bring_down(self) -> None:
        for service in reversed(self._services.values()):
            if service.status is Status.WAITING or service.status is Status.FAILED:
                continue
            if service.exit_code() is None:
                service.terminate()
                self._tell(service)
            deadline = time.monotonic() + self.options.grace_s + EXIT_MARGIN_S
            while service.exit_code() is None:
                if self._hurry.is_set() or time.monotonic() > deadline:
                    service.signal_group(signal.SIGKILL)
                time.sleep(TICK_S)
            service.status, service.detail = Status.STOPPED, ""
            self._tell(service)

    def _tell(self, service: ServiceProcess) -> None:
        with self._changed:
            self._changed.notify_all()
        self._on_change(service.state())
