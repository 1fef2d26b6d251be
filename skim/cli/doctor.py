"""`skim doctor`: what works here, what does not, and what to do about it.

Asks each package's own doctor in a child process and reads the JSON it prints, so that a missing
extra, a broken library or a crash is a line of the report. Exit code 1 when something that Skim
needs is broken; a missing GPU is not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from skim.cli.bundled import CROSS_DRAFTER, DRAFTER, TARGET, bundled_model, check_model_path
from skim.cli.health import Health, probe
from skim.cli.output import EXIT_FAILED, Output
from skim.cli.ports import DEFAULT_BASE_PORT, plan_ports, require_free
from skim.errors import ConfigError, SkimError

DOCTORS = ("modelfile", "kernels", "drafter_svc", "target_svc")
DOCTOR_TIMEOUT_S = 120.0
PACKAGES = (
    "grpcio",
    "grpcio-health-checking",
    "protobuf",
    "numpy",
    "llama-cpp-python",
    "tokenizers",
    "typer",
    "rich",
)
OPTIONAL_PACKAGES = ("cuda-python", "nvidia-ml-py", "nvmath-python")
MARKS = {True: "[green]ok[/]", False: "[red]broken[/]", None: "[yellow]note[/]"}


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` None: worth knowing, nothing is broken."""

    topic: str
    ok: bool | None
    finding: str
    advice: str = ""


def run_doctor(output: Output, models: dict[str, Path | None], base_port: int) -> int:
    """Check everything, print the list, return the exit code."""
    with ThreadPoolExecutor(max_workers=len(DOCTORS)) as pool:
        reports = pool.map(run_child, DOCTORS)
        checks = [*check_versions(), *check_models(models), *check_ports(base_port)]
        details = dict(zip(DOCTORS, reports, strict=True))
    for package, report in details.items():
        checks += read_report(package, report)
    for check in checks:
        output.console.print(f"{MARKS[check.ok]:>22}  [bold]{check.topic}[/]  ", end="")
        output.console.print(check.finding, markup=False, soft_wrap=True)
        if check.advice:
            output.console.print(f"{'':8}-> {check.advice}", markup=False, soft_wrap=True)
    broken = [check.topic for check in checks if check.ok is False]
    verdict = f"Broken: {', '.join(broken)}." if broken else "Everything that Skim needs works."
    output.console.print(verdict, style="red" if broken else "green")
    output.json_line(
        {"ok": not broken, "checks": [asdict(check) for check in checks], "reports": details}
    )
    return EXIT_FAILED if broken else 0


def check_versions() -> list[Check]:
    """Versions of the packages that decide whether anything runs."""
    checks = [Check("python", sys.version_info >= (3, 11), sys.version.split()[0])]
    for package in (*PACKAGES, *OPTIONAL_PACKAGES):
        needed = package in PACKAGES
        try:
            checks.append(Check(package, True, metadata.version(package)))
        except metadata.PackageNotFoundError:
            advice = f"install it: pip install {package}" if needed else ""
            finding = "not installed" if needed else "not installed; needed for a GPU only"
            checks.append(Check(package, False if needed else None, finding, advice))
    return checks


def check_models(models: dict[str, Path | None]) -> list[Check]:
    """That the model files are there. What they hold is the modelfile doctor's part."""
    bundled = {"target": TARGET, "drafter": DRAFTER, "cross drafter": CROSS_DRAFTER}
    checks = []
    for role, name in bundled.items():
        given = models.get(role)
        try:
            path = check_model_path(given or bundled_model(name), role)
        except SkimError as error:
            advice = "copy the file again, or name another with --target and --drafter"
            checks.append(Check(f"{role} model", False, error.message, advice))
        else:
            size = path.stat().st_size / 1e6
            checks.append(Check(f"{role} model", True, f"{path} ({size:.1f} MB)"))
    return checks


def check_ports(base_port: int = DEFAULT_BASE_PORT) -> list[Check]:
    """Whether the ports are free, or Skim answers on them already."""
    checks = []
    for name, ports in plan_ports(base_port).items():
        for role, port in zip((name, f"{name} admin"), ports, strict=True):
            address = f"127.0.0.1:{port}"
            try:
                require_free([(role, address)])
                checks.append(Check(f"port {port}", True, f"free for the {role}"))
            except ConfigError:
                checks.append(_who_listens(role, port, address))
    return checks


def _who_listens(role: str, port: int, address: str) -> Check:
    health = probe(address)
    if health is Health.UNREACHABLE:
        finding = f"in use by another program; the {role} wants it"
        advice = "stop that program, or choose other ports: skim up --port 0"
        return Check(f"port {port}", None, finding, advice)
    return Check(f"port {port}", True, f"a Skim service answers: {health}")


def run_child(package: str) -> dict[str, Any]:
    """Run `python -m PACKAGE.doctor` and read the JSON it prints last.

    Returns:
        Its report, or `{"ok": False, "lines": [why there is none]}`.
    """
    command = [sys.executable, "-m", f"{package}.doctor"]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=DOCTOR_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return _no_report(f"{package}.doctor did not answer within {DOCTOR_TIMEOUT_S:g} s")
    lines = child.stdout.strip().splitlines()
    try:
        report = json.loads(lines[-1]) if lines else None
    except ValueError:
        report = None
    if isinstance(report, dict):
        return report
    last = (child.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return _no_report(f"{package}.doctor ended with code {child.returncode}: {last}")


def _no_report(why: str) -> dict[str, Any]:
    return {"ok": False, "lines": [why]}


def read_report(package: str, report: dict[str, Any]) -> list[Check]:
    """Lines of the checklist for one package's report.

    A report has `ok` and `lines` (sentences for people); whatever else it holds is shown with
    `--json`.
    """
    lines = [str(line) for line in report.get("lines", [])]
    ok = bool(report.get("ok"))
    first = lines[0] if lines else ("works" if ok else "does not work")
    advice = "" if ok else "install Skim anew: pip install --force-reinstall skim"
    head = Check(package, ok, first, str(report.get("advice") or advice))
    return [head, *(Check(package, None if ok else False, line) for line in lines[1:])]
