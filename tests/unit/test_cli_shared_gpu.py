"""Whether the local stack shares a GPU's memory: who decides, where the socket lies, the line."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from skim.cli import shared_gpu
from skim.cli.shared_gpu import KEEP_OWN, PATH_MAX_BYTES, plan_sharing, try_transports
from skim.cli.stack import LocalStack
from skim.cli.stack_plan import StackOptions, plan_stack

WORKS = {"ok": True, "transport": "vmm_fd", "line": "Memory passes."}
FAILS = {"ok": False, "transport": "vmm_fd", "line": "Memory does not pass: no NVML."}
SETTINGS = ("TARGET_MEMORY_SOCKET", "DRAFTER_MEMORY_SOCKET", "DRAFTER_BACKEND")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in (*SETTINGS, "TARGET_MEMORY_TRANSPORT"):
        monkeypatch.delenv(f"SKIM_{name}", raising=False)


def planned(options: StackOptions | None = None, **changes: Any) -> shared_gpu.Sharing:
    given = {"has_driver": lambda: True, "trial": lambda transport: WORKS, **changes}
    return plan_sharing(options or StackOptions(), **given)


def test_target_and_drafters_are_told_one_socket_and_the_gateway_none(tmp_path: Path) -> None:
    sharing = planned(parents=[str(tmp_path)])
    told = {plan.name: plan.environment for plan in sharing.apply(plan_stack(StackOptions()))}
    socket = told["target"]["SKIM_TARGET_MEMORY_SOCKET"]
    assert told["drafter"]["SKIM_DRAFTER_MEMORY_SOCKET"] == socket
    assert "SKIM_DRAFTER_MODEL" in told["drafter"]
    assert not any("MEMORY" in name for name in told["gateway"])
    assert socket in sharing.line and "vmm_fd" in sharing.line
    sharing.cleanup()


def test_socket_lies_in_a_short_folder_of_this_user_alone_that_goes_at_the_end(
    tmp_path: Path,
) -> None:
    deep = tmp_path / ("x" * PATH_MAX_BYTES)
    deep.mkdir()
    sharing = planned(parents=[str(tmp_path / "missing"), str(deep), "/tmp"])
    socket = Path(sharing.environment["SKIM_TARGET_MEMORY_SOCKET"])
    assert len(os.fsencode(socket)) <= PATH_MAX_BYTES and socket.parent.parent == Path("/tmp")
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert not list(deep.iterdir())
    sharing.cleanup()
    assert not socket.parent.exists()


def test_no_folder_with_a_short_path_is_one_line(tmp_path: Path) -> None:
    sharing = planned(parents=[str(tmp_path / "missing")])
    assert not sharing.environment
    assert KEEP_OWN in sharing.line


def test_memory_that_does_not_pass_is_one_line_with_the_reason() -> None:
    sharing = planned(trial=lambda transport: FAILS)
    assert (sharing.environment, sharing.folder) == ({}, None)
    assert sharing.line == f"{FAILS['line']} So {KEEP_OWN}."


@pytest.mark.parametrize(
    "options",
    [
        StackOptions(share_gpu=False),
        StackOptions(environment={"SKIM_TARGET_MEMORY_SOCKET": "/run/skim/s"}),
        StackOptions(environment={"SKIM_DRAFTER_MEMORY_SOCKET": "/run/skim/s"}),
        StackOptions(environment={"SKIM_DRAFTER_BACKEND": "cpu"}),
    ],
)
def test_choice_of_the_user_is_left_alone_and_nothing_is_tried(options: StackOptions) -> None:
    def trial(transport: str | None) -> Any:
        pytest.fail("tried")

    assert planned(options, trial=trial) == shared_gpu.Sharing()


def test_machine_without_a_driver_says_nothing() -> None:
    assert planned(has_driver=lambda: False) == shared_gpu.Sharing()


def test_transport_that_the_user_set_is_the_one_that_is_tried() -> None:
    tried: list[str | None] = []

    def trial(transport: str | None) -> Any:
        tried.append(transport)
        return {**WORKS, "transport": "legacy_ipc"}

    options = StackOptions(environment={"SKIM_TARGET_MEMORY_TRANSPORT": "legacy_ipc"})
    sharing = planned(options, trial=trial)
    assert tried == ["legacy_ipc"]
    assert sharing.environment["SKIM_TARGET_MEMORY_TRANSPORT"] == "legacy_ipc"
    sharing.cleanup()


def test_trial_without_a_gpu_says_what_is_missing() -> None:
    if shared_gpu.has_cuda_driver():
        pytest.skip("needs a machine without a GPU")
    found = try_transports()
    assert not found["ok"]
    assert "does not pass between two processes by vmm_fd" in found["line"]


def test_trial_that_takes_too_long_is_one_sentence() -> None:
    found = try_transports(timeout_s=0.01)
    assert found == {"ok": False, "line": "No transport of GPU memory answered in 0.01 s."}


def test_trial_that_dies_is_one_sentence() -> None:
    found = try_transports("no_such_transport")
    assert not found["ok"] and "no transport is named 'no_such_transport'" in found["line"]


def test_stack_tells_its_services_and_removes_the_folder_when_it_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_gpu, "has_cuda_driver", lambda: True)
    monkeypatch.setattr(shared_gpu, "try_transports", lambda transport: WORKS)
    stack = LocalStack(StackOptions(base_port=0))
    (socket,) = {
        Path(value)
        for plan in stack.plans
        for name, value in plan.environment.items()
        if name.endswith("MEMORY_SOCKET")
    }
    assert socket.parent.is_dir()
    stack.stop()
    assert not socket.parent.exists()
