"""The three real services with the bundled pair, started once a session as real processes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from skim.cli.bundled import CROSS_DRAFTER, DRAFTER, bundled_model
from skim.cli.stack import LocalStack
from skim.cli.stack_plan import StackOptions
from skim.client import Client
from skim.demo_document import build_document
from skim.v1 import target_pb2, target_pb2_grpc
from tests.fixtures.own_time import OwnTime

ROOT = Path(__file__).resolve().parents[2]
CROSS_NAME = Path(CROSS_DRAFTER).stem
# Far above what anything here takes, even on a busy machine: a wait that needs it has failed.
WAIT_S = 60.0
ENVIRONMENT = {
    "SKIM_TARGET_CALIBRATION_S": "0",
    # A busy machine must not turn a slow pass into a full prefill.
    "SKIM_GATEWAY_SCORE_TIMEOUT_S": "60",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder starts real services."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.e2e)


def until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Wait until `condition` gives something true, and return that."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:g} s: {what}")
        pause.wait(0.02)
    return found


class System:
    """The running stack, and what the tests look at besides the gateway."""

    def __init__(self, stack: LocalStack) -> None:
        self.stack = stack
        self.address = stack.gateway_address
        self._channel = grpc.insecure_channel(stack.address("target"))
        self._target: Any = target_pb2_grpc.TargetServiceStub(self._channel)

    def load(self) -> target_pb2.GetLoadResponse:
        """The target's load."""
        request = target_pb2.GetLoadRequest()
        found: target_pb2.GetLoadResponse = self._target.GetLoad(request, timeout=WAIT_S)
        return found

    def engine(self) -> psutil.Process | None:
        """The target's engine child, if it runs."""
        return engine_of(self.stack.pid("target") or 0)

    def own_time(self) -> OwnTime:
        """A stopwatch for the work of all services."""
        engine = self.engine()
        pids = [self.stack.pid(name) for name in ("gateway", "drafter", "target")]
        return OwnTime(*(pid for pid in (*pids, engine and engine.pid) if pid))

    def idle(self) -> bool:
        """Whether the target works on nothing."""
        load = self.load()
        return load.running == 0 and load.queued == 0

    def close(self) -> None:
        """Close the connection to the target."""
        self._channel.close()


def engine_of(target_pid: int) -> psutil.Process | None:
    """The engine child of a target's process, if it runs."""
    for child in psutil.Process(target_pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # ended, reaped or not, as we looked
            if "target_svc.llama" in " ".join(child.cmdline()):
                return child
    return None


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The services, both bundled drafters behind one gateway."""
    options = StackOptions(
        drafters=(bundled_model(DRAFTER), bundled_model(CROSS_DRAFTER)),
        base_port=0,
        log_dir=tmp_path_factory.mktemp("logs"),
        grace_s=5.0,
        environment=ENVIRONMENT,
    )
    with LocalStack(options) as stack:
        running = System(stack)
        with Client(running.address, deadline_s=WAIT_S) as client:
            until(lambda: all(m.serving for m in client.models().models), "all models serve")
        yield running
        running.close()


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    """A client of the gateway, once nothing of an earlier test runs any more."""
    until(system.idle, "the target is idle")
    with Client(system.address, deadline_s=2 * WAIT_S) as client:
        yield client


@pytest.fixture(scope="session")
def prose() -> Callable[[int], str]:
    """Docstring prose of about so many tokens (counted as characters over 3.4)."""

    @cache
    def make(tokens: int) -> str:
        return "\n\n".join(build_document(tokens, lambda text: round(len(text) / 3.4), seed=3))

    return make
