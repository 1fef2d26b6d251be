"""How a service's process starts: settings, one line for an error, a silent gRPC."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from skim import process
from skim.config import ServiceSettings, settings_config
from skim.errors import ConfigError, EngineFault, ModelFileError, SkimError


class Example(ServiceSettings):
    table: ClassVar[str] = "drafter"
    model_config = settings_config("SKIM_EXAMPLE_")
    model: Path = Path("none")


@pytest.mark.parametrize(
    ("failure", "status"),
    [(ConfigError("taken"), 2), (ModelFileError("cut"), 2), (EngineFault("gone"), 1), (None, 0)],
)
def test_an_error_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: SkimError | None,
    status: int,
) -> None:
    async def serve(settings: Example) -> None:
        assert settings.model == Path("given")
        if failure is not None:
            raise failure

    monkeypatch.setattr(process, "configure", lambda *args, **options: None)  # outlives a test
    monkeypatch.setattr(sys, "argv", ["drafter_svc", "--model", "given"])
    assert process.run_service("drafter_svc", None, Example, serve) == status
    lines = capsys.readouterr().err.splitlines()
    assert lines == ([] if failure is None else [f"drafter: {failure.message}"])


@pytest.mark.parametrize("package", ["drafter_svc", "gateway", "skim.cli.app", "target_svc"])
def test_grpc_is_silenced_before_it_is_imported(package: str) -> None:
    """It reads its log level while it is imported, and its lines are not JSON."""
    module = package if "." in package else f"{package}.__main__"
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    order = done.stdout.split()
    assert order.index("skim") < order.index("grpc")
