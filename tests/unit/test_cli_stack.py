"""The local stack on fake services: order, crashes, refusals, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from skim.cli import stack as stack_module
from skim.cli.ports import free_ports
from skim.cli.service_process import ServiceProcess, ServiceState, Status
from skim.cli.stack import LocalStack
from skim.cli.stack_plan import ServicePlan, StackOptions
from skim.errors import Cancelled, ConfigError, DeadlineExceeded, EngineFault

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("target", "drafter", "gateway")
TIMEOUT_S = 30.0

MakeStack = Callable[..., LocalStack]


def fake_plan(name: str, log_dir: Path, mode: str = "ready") -> ServicePlan:
    data, admin = (f"127.0.0.1:{port}" for port in free_ports(2))
    environment = {"SKIM_FAKE_LISTEN": data, "SKIM_FAKE_MODE": mode, "PYTHONPATH": str(ROOT)}
    log = log_dir / f"{name}.log"
    return ServicePlan(name, "tests.fixtures.fake_service", data, admin, environment, (), log)


@pytest.fixture
def make_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeStack]:
    made: list[LocalStack] = []

    def make(
        on_change: Callable[[ServiceState], None] | None = None,
        options: StackOptions | None = None,
        **modes: str,
    ) -> LocalStack:
        plans = tuple(fake_plan(name, tmp_path, modes.get(name, "ready")) for name in NAMES)
        monkeypatch.setattr(stack_module, "plan_stack", lambda options: plans)
        made.append(LocalStack(options or StackOptions(grace_s=5.0), on_change))
        return made[-1]

    yield make
    for stack in made:
        stack.request_stop(hurry=True)
        stack.stop()


def test_start_brings_services_up_in_order_and_stop_takes_them_down_in_reverse(
    make_stack: MakeStack,
) -> None:
    seen: list[tuple[str, Status]] = []
    with make_stack(lambda state: seen.append((state.name, state.status))):
        pass
    ready = [name for name, status in seen if status is Status.READY]
    stopped = [name for name, status in seen if status is Status.STOPPED]
    assert (ready, stopped) == ([*NAMES], [*reversed(NAMES)])


def test_service_that_is_killed_comes_back_under_another_process(make_stack: MakeStack) -> None:
    with make_stack() as stack:
        first = stack.pid("drafter")
        stack.kill("drafter")
        stack.wait_for("drafter", Status.READY, restarts=1, timeout_s=TIMEOUT_S)
        assert stack.pid("drafter") not in (None, first)


def test_state_of_a_killed_service_names_the_signal_and_the_pause(make_stack: MakeStack) -> None:
    details: list[str] = []
    crashed = threading.Event()

    def on_change(state: ServiceState) -> None:
        if state.status is Status.RESTARTING:
            details.append(state.detail)
            crashed.set()

    with make_stack(on_change) as stack:
        stack.kill("target")
        assert crashed.wait(TIMEOUT_S)
    assert details[0] == "killed by SIGKILL; starts again in 0.5 s"


def test_pause_before_a_restart_doubles_up_to_half_a_minute(tmp_path: Path) -> None:
    service = ServiceProcess(fake_plan("target", tmp_path))
    pauses = [service.backoff_s() for _ in range(9)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_start_reports_the_line_a_service_prints_when_it_refuses_its_settings(
    make_stack: MakeStack,
) -> None:
    stack = make_stack(drafter="refuse")
    with pytest.raises(ConfigError, match="drafter did not start: slots must be at least 1, got 0"):
        stack.start()
    assert stack.pid("target") is None


def test_start_names_the_log_when_a_service_dies_without_a_word(make_stack: MakeStack) -> None:
    stack = make_stack(target="crash")
    with pytest.raises(EngineFault, match="exited with code 3") as caught:
        stack.start()
    assert caught.value.metadata["log"] == str(stack.plans[0].log_path)


def test_start_gives_up_on_a_service_that_is_never_ready(make_stack: MakeStack) -> None:
    options = StackOptions(grace_s=5.0, start_timeout_s=2.0)
    with pytest.raises(DeadlineExceeded, match="target was not ready within 2 s"):
        make_stack(options=options, target="loading").start()


def test_start_refuses_a_port_in_use_before_any_process_runs(make_stack: MakeStack) -> None:
    stack = make_stack()
    address = stack.address("gateway")
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        with pytest.raises(ConfigError, match=f"{address} for the gateway: the port is in use"):
            stack.start()
    assert [state.status for state in stack.states()] == [Status.WAITING] * 3


def test_stop_while_a_service_loads_ends_the_start(make_stack: MakeStack) -> None:
    stack = make_stack(target="loading")
    stack.launch()
    stack.request_stop()
    with pytest.raises(Cancelled):
        while not stack.is_up():
            os.sched_yield()
    stack.stop()
    assert stack.pid("target") is None


def test_hurried_stop_kills_a_service_that_ignores_its_signal(make_stack: MakeStack) -> None:
    # So long a grace that the test would run out of time if the hurry did nothing.
    stack = make_stack(options=StackOptions(grace_s=3_600.0), target="stubborn")
    stack.start()
    pid = stack.pid("target")
    assert pid is not None
    process = psutil.Process(pid)
    stack.request_stop(hurry=True)
    stack.stop()
    assert not process.is_running()


def test_services_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from tests.unit.test_cli_stack import *\n"
        "plans = tuple(fake_plan(name, Path(sys.argv[1])) for name in NAMES)\n"
        "stack_module.plan_stack = lambda options: plans\n"
        "stack = LocalStack(StackOptions())\n"
        "stack.start()\n"
        "print(*(stack.pid(name) for name in NAMES), flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    supervisor = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=environment,
        cwd=ROOT,
    )
    with supervisor:
        assert supervisor.stdout is not None
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        children = [psutil.Process(pid) for pid in pids]
        supervisor.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=TIMEOUT_S)
    assert len(children) == 3
    assert alive == []


def test_children_are_shielded_from_a_ctrl_c_at_the_terminal(make_stack: MakeStack) -> None:
    with make_stack() as stack:
        groups = {os.getpgid(stack.pid(name) or 0) for name in NAMES}
    assert os.getpgid(0) not in groups


def test_service_log_is_appended_to_across_restarts(tmp_path: Path) -> None:
    plan = replace(fake_plan("target", tmp_path, "refuse"))
    service = ServiceProcess(plan)
    for _ in range(2):
        service.spawn()
        while service.exit_code() is None:
            os.sched_yield()
    assert plan.log_path.read_text().count("fake: slots") == 2
