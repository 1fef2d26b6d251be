"""Trials of the memory transports: two real processes on fake memory, and each way to fail."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kernels.device import Device
from kernels.errors import HandleError
from kernels.ipc import legacy, trial
from kernels.ipc.channel import close_fds
from kernels.ipc.fake_legacy import FakeLegacyPhysical
from kernels.ipc.fake_physical import FakePhysical, FakeRegion
from kernels.ipc.physical import Physical, Transport
from kernels.ipc.transports import sentence, try_transport
from kernels.ipc.trial import SIZE_BYTES, landlord, tenant
from tests.emulator.device import EmulatedDevice
from tests.tools import ROOT, require_tool

ON_FAKE = "tests.fixtures.trial_on_fake"


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    require_tool("g++")
    emulated = EmulatedDevice()
    yield emulated
    emulated.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trial.sock"


def run_both(physical: Physical, device: Device, path: Path) -> tuple[dict[str, Any], ...]:
    """Both peers in threads of this process: their reports, the landlord's first."""
    with ThreadPoolExecutor(2) as pool:
        reports: list[Future[dict[str, Any]]] = [
            pool.submit(landlord, physical, path),
            pool.submit(tenant, device, path),
        ]
        return tuple(report.result(timeout=60) for report in reports)


def read_by_hand(path: Path, *answers: dict[str, Any]) -> None:
    """A tenant that answers what it is told to, and closes its socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        trial._connect(sock, path)
        for answer in answers:
            sock.sendall(json.dumps(answer).encode())


def landlord_beside(path: Path, physical: Physical, *answers: dict[str, Any]) -> dict[str, Any]:
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(landlord, physical, path)
        read_by_hand(path, *answers)
        return report.result(timeout=60)


@pytest.mark.parametrize("transport", trial.TRANSPORTS)
def test_memory_passes_between_two_processes(transport: Transport) -> None:
    require_tool("g++")
    report = try_transport(transport, module=ON_FAKE)
    assert report["ok"], report
    assert report["freed_bytes"] == SIZE_BYTES
    assert report["line"].startswith(f"Memory passes between two processes by {transport}: 64 MiB")


def test_peers_that_cannot_start_are_one_sentence_with_the_reason() -> None:
    report = try_transport("vmm_fd", module="tests.fixtures.no_such_peer")
    assert not report["ok"]
    assert "the landlord ended with code 1" in report["line"]
    assert report["line"].endswith("No module named tests.fixtures.no_such_peer.")


def test_peers_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging.py").write_text("import threading; threading.Event().wait()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = try_transport("vmm_fd", module="hanging", timeout_s=0.2)
    assert report["reason"] == "the landlord did not end and was killed"


def test_peers_are_siblings_in_sessions_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "telling.py").write_text(
        "import json, os\n"
        "alone = os.getsid(0) == os.getpid()\n"
        "print(json.dumps({'ok': False, 'reason': f'{os.getppid()} {alone}'}))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert try_transport("vmm_fd", module="telling")["reason"] == f"{os.getpid()} True"


def test_other_gpu_is_told_to_both(path: Path) -> None:
    require_tool("g++")
    reports = run_both(FakePhysical(SIZE_BYTES), EmulatedDevice(uuid="GPU-2"), path)
    for report in reports:
        assert not report["ok"]
        assert "the tenant's GPU-2: give both processes the same GPU" in report["reason"]


def test_other_pid_namespace_is_told_to_both(
    path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy, "pid_namespace", lambda: 7)  # the tenant's, when it maps
    physical = FakeLegacyPhysical(FakePhysical(SIZE_BYTES))
    for report in run_both(physical, device, path):
        assert "inside one PID namespace only" in report["reason"]
        assert (
            "this process's 7" in report["reason"]
            and "use the transport vmm_fd" in (report["reason"])
        )
    assert physical.used_bytes() == 0


@pytest.mark.parametrize(("transport", "passes"), [("vmm_fd", True), ("legacy_ipc", False)])
def test_only_descriptors_pass_between_sibling_pid_namespaces(
    path: Path, transport: Transport, passes: bool
) -> None:
    require_tool("g++")
    apart = [require_tool("unshare"), "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a PID namespace")
    command = [*apart, sys.executable, "-m", ON_FAKE]
    peers = [
        subprocess.Popen([*command, role, transport, path], stdout=subprocess.PIPE, cwd=ROOT)
        for role in ("landlord", "tenant")
    ]
    reports = [json.loads(peer.communicate(timeout=60)[0]) for peer in peers]
    assert [report["ok"] for report in reports] == [passes, passes], reports
    ours, theirs = reports[0]["pid_namespace"]
    assert ours != theirs
    if not passes:
        assert f"the landlord's is {ours}, this process's {theirs}" in reports[0]["reason"]


def test_gpu_without_room_is_told_to_both(path: Path, device: Device) -> None:
    for report in run_both(FakePhysical(SIZE_BYTES // 2), device, path):
        assert "asked for 67,108,864 bytes, 33,554,432 are free" in report["reason"]


class Forgetful(FakePhysical):
    """Each export is of other memory, as if the driver mapped what it liked."""

    def create(self, size_bytes: int) -> FakeRegion:
        made, physical = super().create(size_bytes), super()
        made.export = lambda: physical.create(size_bytes).export()  # type: ignore[method-assign]
        return made


def test_memory_with_other_content_is_found(path: Path, device: Device) -> None:
    reports = run_both(Forgetful(3 * SIZE_BYTES), device, path)
    for report in reports:
        assert report["reason"] == "the tenant found other bytes than it had written"


class Clinging(FakePhysical):
    """Keeps every region that it makes."""

    def __init__(self, total_bytes: int) -> None:
        super().__init__(total_bytes)
        self.kept: list[int] = []

    def create(self, size_bytes: int) -> FakeRegion:
        made = super().create(size_bytes)
        self.kept.append(made.export())
        return made


def test_bytes_that_do_not_come_free_are_found(path: Path, device: Device) -> None:
    physical = Clinging(trial.ATTEMPTS * SIZE_BYTES)
    report, _ = run_both(physical, device, path)
    close_fds(physical.kept)
    assert not report["ok"] and report["freed_bytes"] == 0
    assert report["reason"].startswith("0 of 67,108,864 bytes came free when both let go")


class Unexportable(FakePhysical):
    def create(self, size_bytes: int) -> FakeRegion:
        def refuse() -> int:
            raise HandleError("export", "failed with CUDA_ERROR_NOT_SUPPORTED")

        made = super().create(size_bytes)
        made.export = refuse  # type: ignore[method-assign]
        return made


class Busy(FakePhysical):
    """Another process takes memory as the first region comes free."""

    taken: FakeRegion | None = None

    def used_bytes(self) -> int:
        used = super().used_bytes()
        if self.taken is None:
            self.taken = super().create(SIZE_BYTES)
        return used


def test_memory_that_others_take_meanwhile_is_no_failure(path: Path, device: Device) -> None:
    physical = Busy(2 * SIZE_BYTES)
    for report in run_both(physical, device, path):
        assert report["ok"], report
    assert physical.taken is not None
    physical.taken.close()


def test_refusal_of_the_driver_is_told_to_both(path: Path, device: Device) -> None:
    physical = Unexportable(SIZE_BYTES)
    for report in run_both(physical, device, path):
        assert report["reason"] == "export: failed with CUDA_ERROR_NOT_SUPPORTED"
    assert physical.used_bytes() == 0


def test_tenant_that_dies_is_a_sentence_and_leaves_no_memory(path: Path) -> None:
    physical = FakePhysical(SIZE_BYTES)
    hello = {"gpu_uuid": physical.uuid, "pid_namespace": 1}
    report = landlord_beside(path, physical, hello)
    assert report["reason"] in (
        "the tenant ended without an answer",
        "the tenant went away: Broken pipe",
        "the tenant went away: Connection reset by peer",
    )
    assert physical.used_bytes() == 0


def test_tenant_that_says_nothing_is_a_sentence(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "PEER_TIMEOUT_S", 0.2)
    with ThreadPoolExecutor(1) as pool, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as it:
        report = pool.submit(landlord, FakePhysical(SIZE_BYTES), path)
        trial._connect(it, path)
        assert report.result(timeout=60)["reason"] == "the tenant did not answer in 0.2 s"


def test_peer_that_nobody_joins_is_a_sentence(
    path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "PEER_TIMEOUT_S", 0.1)
    alone = landlord(FakePhysical(SIZE_BYTES), path)
    assert alone["reason"] == "no tenant came within 0.1 s" and not path.exists()
    assert tenant(device, path)["reason"].startswith(f"no landlord listens at {path}: No such file")


def test_failure_is_one_sentence_for_people() -> None:
    line = sentence({"transport": "legacy_ipc", "ok": False, "reason": "it is closed."})
    assert line == "Memory does not pass between two processes by legacy_ipc: it is closed."


def test_peer_without_a_gpu_says_why_it_cannot_start(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(transport: Transport) -> Physical:
        raise HandleError("device", "no driver")

    assert trial.main(refuse, EmulatedDevice, ["landlord", "vmm_fd", str(path)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["reason"] == "the landlord cannot start: device: no driver"
