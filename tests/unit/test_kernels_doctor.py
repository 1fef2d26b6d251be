"""The kernels' doctor: one JSON object, whatever the machine has."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kernels import doctor


def test_doctor_prints_one_json_object() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kernels.doctor"], capture_output=True, text=True, timeout=60
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["package"] == "kernels"
    assert report["backend"] == ("cuda" if report["devices"] else "cpu")
    assert report["lines"]


def test_doctor_says_what_to_install_when_cuda_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    report = doctor.examine()
    assert report["ok"] and report["backend"] == "cpu" and not report["cuda_importable"]
    assert "pip install 'skim[gpu]'" in report["lines"][0]


def test_doctor_names_the_call_of_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Status(int):
        name = "CUDA_ERROR_NO_DEVICE"

    class Driver:
        class CUdevice_attribute:
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76

        @staticmethod
        def cuInit(flags: int) -> tuple[Status]:
            return (Status(100),)

    real = doctor.importlib.import_module
    monkeypatch.setattr(
        doctor.importlib,
        "import_module",
        lambda name: Driver if name == "cuda.bindings.driver" else real(name),
    )
    report = doctor.examine()
    assert report["backend"] == "cpu" and report["devices"] == []
    assert "cuInit failed with CUDA_ERROR_NO_DEVICE" in report["lines"][0]
