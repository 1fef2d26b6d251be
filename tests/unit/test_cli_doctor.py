"""The doctor: reports of child processes become lines, whatever the child does."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from skim.cli import doctor
from skim.cli.doctor import Check, check_ports, find_models, read_report, run_child, run_doctor
from skim.cli.output import Output
from skim.cli.ports import free_ports


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a package with the given doctor and return its name."""

    def write(source: str) -> str:
        folder = tmp_path / "ailing"
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "doctor.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "ailing"

    return write


def test_child_reports_are_its_json_lines(package: Any) -> None:
    name = package('print("loading"); print(\'{"ok": true}\'); print(\'{"ok": false}\')')
    assert run_child(name) == [{"ok": True}, {"ok": False}]


def test_child_that_crashes_is_one_broken_report(package: Any) -> None:
    (report,) = run_child(package("import no_such_library"))
    assert report["ok"] is False
    assert "code 1: ModuleNotFoundError: No module named 'no_such_library'" in report["lines"][0]


def test_package_that_is_not_installed_is_one_broken_report() -> None:
    (report,) = run_child("no_such_package")
    assert report["ok"] is False


def test_child_that_hangs_is_one_broken_report(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "DOCTOR_TIMEOUT_S", 0.5)
    (report,) = run_child(package("import threading; threading.Event().wait()"))
    assert "did not answer within 0.5 s" in report["lines"][0]


def test_report_that_is_well_keeps_its_remarks_as_notes() -> None:
    report = {"ok": True, "lines": ["2 cores", "no GPU: the cuda package is not installed"]}
    assert [check.ok for check in read_report("kernels", report)] == [True, None]


def test_memory_transport_has_a_line_of_its_own_and_breaks_nothing() -> None:
    works = {"transport": "vmm_fd", "ok": True, "lines": ["Memory passes."]}
    fails = {"transport": "legacy_ipc", "ok": None, "lines": ["It does not."], "advice": "use it"}
    assert [read_report("kernels", report) for report in (works, fails)] == [
        [Check("kernels vmm_fd", True, "Memory passes.")],
        [Check("kernels legacy_ipc", None, "It does not.", "use it")],
    ]


def test_problem_of_a_model_file_names_the_file_and_what_to_do() -> None:
    report = {"path": "/x/skim.gguf", "ok": False, "problems": ["cut short at byte 77"]}
    (check,) = read_report("modelfile", report)
    assert check == Check(
        "modelfile skim.gguf", False, "cut short at byte 77", doctor.ADVICE["modelfile"]
    )


def test_missing_model_is_a_line_and_the_others_are_still_found(tmp_path: Path) -> None:
    paths, missing = find_models({"target": tmp_path / "gone.gguf"})
    assert [check.topic for check in missing] == ["target model"]
    assert [*paths] == ["drafter", "cross drafter"]


def test_port_of_another_program_is_a_note_with_advice() -> None:
    port = free_ports(1)[0]
    base = port if port < 65_000 else 1
    with socket.create_server(("127.0.0.1", base)):
        checks = check_ports(base)
    assert checks[0].ok is None
    assert "skim up --port 0" in checks[0].advice


def test_doctor_exits_with_1_when_a_needed_part_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"ok": False, "lines": ["no such library"]}
    monkeypatch.setattr(
        doctor,
        "run_child",
        lambda name, arguments=(): [broken if name == "kernels" else {"ok": True}],
    )
    assert run_doctor(Output(as_json=True), {}, 0) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ok"] is False
    assert [c["topic"] for c in report["checks"] if c["ok"] is False] == ["kernels"]
