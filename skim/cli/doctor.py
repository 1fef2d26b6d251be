"""`skim doctor`: what works here, what does not, and what to do about it.

Asks each package's own doctor in a child process and reads the JSON it prints, so that a missing
extra, a broken library or a crash is a line of the report. Exit code 1 when something that Skim
needs is broken; a missing GPU is not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.text import Text

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
OPTIONAL_PACKAGES = (
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cublas",
    "nvmath-python",
    "nvidia-ml-py",
)
BUNDLED = {"target": TARGET, "drafter": DRAFTER, "cross drafter": CROSS_DRAFTER}
ADVICE = {
    "modelfile": "copy the file again, or name another with --target and --drafter",
    "": "install Skim anew: pip install --force-reinstall skim",
}
MARKS = {True: ("ok", "green"), False: ("broken", "red"), None: ("note", "yellow")}


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` None: worth knowing, nothing is broken."""

    topic: str
    ok: bool | None
    finding: str
    advice: str = ""


def run_doctor(output: Output, models: Mapping[str, Path | None], base_port: int) -> int:
    """Check everything, print the list, return the exit code."""
    checks = [*check_versions(), *check_ports(base_port)]
    paths, missing = find_models(models)
    checks += missing
    # Each service's doctor runs its own models: a drafter's would skim with the target.
    drafters = [str(path) for role, path in paths.items() if role != "target"]
    arguments = {
        "modelfile": [str(path) for path in paths.values()],
        "drafter_svc": drafters,
        "target_svc": [str(paths["target"])] if "target" in paths else [],
    }
    with ThreadPoolExecutor(max_workers=len(DOCTORS)) as pool:
        found = pool.map(lambda package: run_child(package, arguments.get(package, ())), DOCTORS)
        reports = dict(zip(DOCTORS, found, strict=True))
    for package, each in reports.items():
        checks += [check for report in each for check in read_report(package, report)]
    for check in checks:
        word, style = MARKS[check.ok]
        line = Text(f"{word:>6}  ", style).append(f"{check.topic}  ", "bold").append(check.finding)
        output.console.print(line, soft_wrap=True)
        if check.advice:
            output.console.print(Text(f"{'':8}-> {check.advice}", "none"), soft_wrap=True)
    broken = [check.topic for check in checks if check.ok is False]
    verdict = f"Broken: {', '.join(broken)}." if broken else "Everything that Skim needs works."
    output.console.print(verdict, style="red" if broken else "green")
    output.json_line(
        {"ok": not broken, "checks": [asdict(check) for check in checks], "reports": reports}
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


def find_models(models: Mapping[str, Path | None]) -> tuple[dict[str, Path], list[Check]]:
    """Paths of the models that are there, and a line for each that is not.

    Args:
        models: by role; None or absent: the bundled one.
    """
    paths: dict[str, Path] = {}
    missing: list[Check] = []
    for role, name in BUNDLED.items():
        try:
            paths[role] = check_model_path(models.get(role) or bundled_model(name), role)
        except SkimError as error:
            missing.append(Check(f"{role} model", False, error.message, ADVICE["modelfile"]))
    return paths, missing


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


def run_child(package: str, arguments: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run `python -m PACKAGE.doctor ARGUMENT…` and read the JSON lines it prints.

    Returns:
        Its reports, or one `{"ok": False, "lines": [why there is none]}`.
    """
    command = [sys.executable, "-m", f"{package}.doctor", *arguments]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=DOCTOR_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return _no_report(f"{package}.doctor did not answer within {DOCTOR_TIMEOUT_S:g} s")
    reports = [found for line in child.stdout.splitlines() if (found := _read_object(line))]
    if reports:
        return reports
    last = (child.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return _no_report(f"{package}.doctor ended with code {child.returncode}: {last}")


def _read_object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _no_report(why: str) -> list[dict[str, Any]]:
    return [{"ok": False, "lines": [why]}]


def read_report(package: str, report: dict[str, Any]) -> list[Check]:
    """Lines of the checklist for one report of a package's doctor.

    A report has `ok` (null: worth knowing, nothing is broken), and sentences for people in `lines`
    or `problems`; one about a file has `path`, one about a memory transport `transport`. Whatever
    else it holds is shown with `--json`.
    """
    about = Path(report["path"]).name if "path" in report else report.get("transport", "")
    topic = f"{package} {about}".rstrip()
    lines = [str(line) for line in (*report.get("problems", ()), *report.get("lines", ()))]
    ok = report.get("ok", False)
    ok = ok if ok is None else bool(ok)
    first = lines[0] if lines else _summary(report)
    advice = str(report.get("advice") or (ADVICE.get(package, ADVICE[""]) if ok is False else ""))
    head = Check(topic, ok, first, advice)
    return [head, *(Check(topic, False if ok is False else None, line) for line in lines[1:])]


def _summary(report: dict[str, Any]) -> str:
    shape = report.get("shape")
    if not isinstance(shape, dict):
        return "works" if report.get("ok") else "does not work"
    size = f"{report.get('size_bytes', 0) / 1e6:.1f} MB"
    layers, context = shape.get("layers"), shape.get("context_length")
    return f"{size}, {shape.get('arch')}, {layers} layers, context {context} tokens"
