"""One service as a child process: start, watch, stop, and say why it died.

Owned by the local stack and touched from its thread only. The child is the leader of its own
process group, so that a ctrl-C at the terminal reaches the supervisor alone, and dies with the
supervisor's thread. Its output goes to a log file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import StrEnum

from skim.cli.health import Health, probe
from skim.cli.stack_plan import ServicePlan
from skim.errors import ConfigError, EngineFault, SkimError

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0
# A service that was ready for this long has recovered: its next crash starts a new backoff.
RECOVERED_AFTER_S = 60.0
LOG_TAIL_BYTES = 16_384
USER_ERROR = 2  # exit code of a service whose settings, model or port cannot be used


class Status(StrEnum):
    """Where a service stands."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    NOT_READY = "not ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class ServiceState:
    """What to show of a service. `restarts` counts since the stack started."""

    name: str
    status: Status
    address: str
    admin_address: str
    pid: int | None
    restarts: int
    detail: str
    log_path: str


class ServiceProcess:
    """The process of one service plan, restarted as often as needed."""

    def __init__(self, plan: ServicePlan) -> None:
        self.plan = plan
        self.status = Status.WAITING
        self.detail = ""
        self.restarts = 0
        self._crashes = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._ready_since_s: float | None = None
        self._log_begin = 0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process else None

    def state(self) -> ServiceState:
        """What to show."""
        plan = self.plan
        return ServiceState(
            name=plan.name,
            status=self.status,
            address=plan.address,
            admin_address=plan.admin_address,
            pid=self.pid,
            restarts=self.restarts,
            detail=self.detail,
            log_path=str(plan.log_path),
        )

    def spawn(self) -> None:
        """Start the process; its log is appended to.

        Must be called from the thread that lives as long as the process shall.
        """
        plan = self.plan
        launcher = (sys.executable, "-m", "skim.cli.launch", str(os.getpid()))
        with plan.log_path.open("ab") as log:
            self._log_begin = log.tell()
            self._process = subprocess.Popen(
                [*launcher, plan.module, *plan.arguments],
                env={**os.environ, **plan.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        self._started_s, self._ready_since_s = time.monotonic(), None
        self.status, self.detail = Status.STARTING, ""

    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.poll() if self._process else None

    def look(self) -> bool:
        """Ask for its health and update `status`; tells whether that changed."""
        before, health = self.status, probe(self.plan.address)
        if health is Health.SERVING:
            self.detail = "" if before is Status.NOT_READY else self.detail
            if self._ready_since_s is None:
                self._ready_since_s = time.monotonic()
                self.detail = f"started in {self._ready_since_s - self._started_s:.1f} s"
            self.status = Status.READY
        elif before is Status.READY:
            self.status, self.detail = Status.NOT_READY, f"its health: {health}"
        return self.status is not before

    def backoff_s(self) -> float:
        """Seconds to wait before the next start, doubling with each crash in a row."""
        ready_s = self._ready_since_s
        if ready_s is not None and time.monotonic() - ready_s > RECOVERED_AFTER_S:
            self._crashes = 0
        self._crashes += 1
        self.restarts += 1
        return float(min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (self._crashes - 1)))

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children, if it runs."""
        if self.pid is not None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                return  # it ended between the two lines

    def terminate(self) -> None:
        """Ask the service to drain and exit."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)
            self.status, self.detail = Status.STOPPING, ""

    def died_as(self) -> str:
        """A few words about how the process ended."""
        code = self.exit_code()
        if code is None:
            return "still running"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def failure(self) -> SkimError:
        """The error that ended the process: the line it printed last, read back from its log."""
        plan, line = self.plan, self._last_words()
        if self.exit_code() == USER_ERROR and line:
            return ConfigError(f"the {plan.name} did not start: {line}", field=plan.name)
        return EngineFault(
            f"the {plan.name} did not start: {line or self.died_as()}",
            field=plan.name,
            got=self.died_as(),
            metadata={"log": str(plan.log_path)},
        )

    def _last_words(self) -> str:
        """What the service printed for people: its last line that is no JSON event."""
        for line in reversed(self._log_tail().splitlines()):
            if line.strip() and not line.startswith("{"):
                return line.partition(": ")[2] or line
        return ""

    def _log_tail(self) -> str:
        with self.plan.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_begin, size - LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace")
