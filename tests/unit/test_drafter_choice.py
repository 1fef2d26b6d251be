"""Which backend a drafter gets, and what is said when it is not the GPU's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drafter_svc import drafter as module
from drafter_svc.backend import Backend
from drafter_svc.config import DrafterSettings
from drafter_svc.cuda_errors import kernel_errors
from drafter_svc.drafter import check_backend, open_backend
from kernels.errors import LaunchError, NoDevice, OutOfMemory
from skim.errors import Busy, ConfigError, EngineFault, ModelFileError
from tests.fixtures.engine import tiny_model

NO_DRIVER = {"backend": "cpu", "reason": "No usable GPU: the driver is asleep"}
GPU = {"backend": "cuda", "reason": ""}


def settings(backend: str) -> DrafterSettings:
    return DrafterSettings(model=tiny_model(), backend=backend, threads=1)


def opened(backend: str) -> tuple[str, str | None]:
    """The backend's name, and why it is the CPU's."""
    opened = open_backend(tiny_model(), settings(backend))
    opened.backend.close()
    return opened.backend.name, opened.why_cpu


def machine(
    monkeypatch: pytest.MonkeyPatch, report: dict[str, Any], failure: Exception | None = None
) -> None:
    """Pretend that the kernels' doctor reports this, and that a GPU's backend fails so."""

    class Stub:
        name = "cuda"

        @classmethod
        def open(cls, path: Path, *, planted: object) -> Backend:
            if failure is not None:
                raise failure
            return cls()  # type: ignore[return-value]

        def warm_up(self, stop: object) -> float:
            return 0.25

        def close(self) -> None:
            pass

    monkeypatch.setattr(module, "examine_kernels", lambda: report)
    monkeypatch.setattr(module, "CudaBackend", Stub)


@pytest.mark.parametrize(
    ("backend", "report", "name"),
    [
        ("auto", GPU, "cuda"),
        ("cuda", GPU, "cuda"),
        ("cpu", GPU, "cpu"),
        ("auto", NO_DRIVER, "cpu"),
        ("cpu", NO_DRIVER, "cpu"),
    ],
)
def test_backend_follows_the_settings_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, backend: str, report: dict[str, Any], name: str
) -> None:
    machine(monkeypatch, report)
    assert opened(backend)[0] == name


def test_cuda_without_a_gpu_is_refused_with_the_doctors_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, NO_DRIVER)
    with pytest.raises(ConfigError, match="the driver is asleep"):
        check_backend(settings("cuda"))


def test_auto_says_why_it_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, NO_DRIVER)
    assert opened("auto") == ("cpu", "No usable GPU: the driver is asleep")


FAILURES = [
    Busy("too little memory"),
    EngineFault("a kernel does not compile"),
    ModelFileError("heads of 80 have no kernel"),
    ConfigError("nvmath is missing"),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_auto_takes_the_cpu_when_the_gpu_cannot_load_the_model(
    monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    machine(monkeypatch, GPU, failure)
    assert opened("auto") == ("cpu", failure.message)


@pytest.mark.parametrize("failure", FAILURES)
def test_cuda_raises_what_keeps_the_model_off_the_gpu(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    machine(monkeypatch, GPU, failure)
    with pytest.raises(type(failure)):
        opened("cuda")


def test_what_kernels_raise_becomes_an_error_of_the_service() -> None:
    with pytest.raises(Busy, match=r"loading x.*4,?096") as busy, kernel_errors("loading x"):
        raise OutOfMemory.of("allocate", 4096, 0)
    assert busy.value.reason == "GPU_MEMORY_EXHAUSTED"
    with pytest.raises(EngineFault, match="block_score") as fault, kernel_errors("scoring"):
        raise LaunchError("block_score", "failed")
    assert fault.value.reason == "GPU_FAULT"
    with pytest.raises(ConfigError, match="too old"), kernel_errors("loading x"):
        raise NoDevice("device", "too old")


def test_drafter_imports_without_the_cuda_package() -> None:
    code = (
        "import sys\n"
        "sys.modules['cuda'] = sys.modules['nvmath'] = None\n"
        "import drafter_svc.__main__, drafter_svc.cuda_backend\n"
        "from drafter_svc.drafter import why_no_gpu\n"
        "print(why_no_gpu())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cuda" in done.stdout
