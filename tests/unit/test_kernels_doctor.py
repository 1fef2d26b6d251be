"""The kernels' doctor: one JSON object, and one sentence for each reason to use the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kernels import doctor

GIB = 1 << 30


class Status(int):
    """A driver's answer: 0, or a failure with a name."""

    name = "CUDA_ERROR_NO_DEVICE"


class Driver:
    """`cuda.bindings.driver` of a machine with one GPU."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
    )

    def __init__(self, init: int = 0, version: int = 13000, count: int = 1, major: int = 9) -> None:
        self.answers: dict[str, tuple[Any, ...]] = {
            "cuInit": (Status(init),),
            "cuDriverGetVersion": (Status(0), version),
            "cuDeviceGetCount": (Status(0), count),
            "cuDeviceGet": (Status(0), 0),
            "cuDeviceGetName": (Status(0), b"Test GPU\0\0"),
            "cuDeviceTotalMem": (Status(0), 80 * GIB),
            "cuDeviceGetPCIBusId": (Status(0), b"0000:01:00.0\0"),
        }
        self.major = major

    def __getattr__(self, name: str) -> Any:
        if name == "cuDeviceGetAttribute":
            return lambda kind, device: (Status(0), self.major if kind == 75 else 0)
        return lambda *arguments: self.answers[name]


def nvml(free_bytes: int) -> SimpleNamespace:
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetHandleByPciBusId=lambda bus: bus,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=free_bytes),
    )


def old_driver_without_a_call() -> Driver:
    driver = Driver(version=12040)
    driver.answers["cuDeviceTotalMem"] = (Status(500), None)
    return driver


class Broken:
    """Of a module whose import raises something else than ImportError."""


def failing(message: str) -> Any:
    def fail(*arguments: object) -> None:
        raise RuntimeError(message)

    return fail


MODULES = {
    "cuda.bindings.driver": Driver(),
    "cuda.bindings.nvrtc": SimpleNamespace(nvrtcVersion=lambda: (Status(0), 13, 0)),
    "cuda.core": SimpleNamespace(),
    "nvmath.bindings.cublasLt": SimpleNamespace(get_version=lambda: 130100),
    "pynvml": nvml(60 * GIB),
}


def examine(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> dict[str, Any]:
    """Run the doctor on a machine whose modules are `MODULES` but for the changed ones.

    Args:
        monkeypatch: puts the real modules back.
        changed: by the last part of the module's name; None: it is not installed.
    """
    modules = {name: changed.get(name.rsplit(".", 1)[-1], it) for name, it in MODULES.items()}
    real = doctor.importlib.import_module

    def load(name: str) -> Any:
        if name not in modules:
            return real(name)
        if modules[name] is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        if isinstance(modules[name], Broken):
            raise AttributeError("a symbol is missing")
        return modules[name]

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    return doctor.examine()


def reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str, *works: bool
) -> list[dict[str, Any]]:
    """What the doctor prints where passes run on `backend` and each transport works or not."""
    trials = [
        {"transport": name, "ok": ok, "line": f"{name} {ok}"}
        for name, ok in zip(("vmm_fd", "legacy_ipc"), works, strict=False)
    ]
    found = {"package": "kernels", "backend": backend, "ok": True, "lines": ["the first"]}
    monkeypatch.setattr(doctor, "examine", lambda: found)
    monkeypatch.setattr(doctor, "try_transports", lambda: trials)
    assert doctor.main() == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_transports_are_not_tried_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (report,) = reports(monkeypatch, capsys, "cpu")
    assert report["lines"] == ["the first", doctor.NOT_TRIED]


def test_each_transport_is_a_report_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, vmm, legacy = reports(monkeypatch, capsys, "cuda", True, False)
    assert (vmm["ok"], vmm["lines"], vmm["advice"]) == (True, ["vmm_fd True"], "")
    assert (legacy["ok"], legacy["lines"]) == (None, ["legacy_ipc False"])
    assert "let the target use vmm_fd: SKIM_TARGET_MEMORY_TRANSPORT" in legacy["advice"]


def test_where_no_transport_works_the_advice_is_to_share_no_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for trial in reports(monkeypatch, capsys, "cuda", False, False)[1:]:
        assert "leave both memory sockets unset" in trial["advice"]


def test_doctor_prints_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kernels.doctor"], capture_output=True, text=True, timeout=60
    )
    report = json.loads(done.stdout.splitlines()[0])
    assert done.returncode == 0
    assert report["package"] == "kernels" and report["ok"]
    assert (report["backend"] == "cuda") == (report["reason"] == "")
    assert report["lines"]


def test_usable_gpu_is_named_with_what_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine(monkeypatch)
    assert report["backend"] == "cuda" and report["reason"] == ""
    assert report["lines"] == [
        "Test GPU, 60.0 of 80.0 GiB free, kernels for sm_90a, CUDA 13.0, NVRTC 13.0, "
        "cuBLASLt 13.1.0."
    ]
    assert report["driver"] == "580.1" and report["devices"][0]["free_bytes"] == 60 * GIB


def test_missing_memory_counters_rule_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine(monkeypatch, pynvml=None)
    assert report["backend"] == "cuda" and report["devices"][0]["free_bytes"] is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"driver": None}, "cuda.bindings.driver is not installed"),
        ({"core": None}, "cuda.core is not installed"),
        ({"cublasLt": None}, "nvmath.bindings.cublasLt is not installed"),
        ({"driver": SimpleNamespace(cuInit=failing("no libcuda."))}, "No usable GPU: no libcuda"),
        ({"driver": Driver(init=100)}, "No usable GPU: cuInit failed with CUDA_ERROR_NO_DEVICE"),
        ({"driver": Driver(count=0)}, "The CUDA driver lists no device"),
        ({"driver": Driver(version=12040)}, "The driver knows CUDA 12.4, at least 13.0 is needed"),
        ({"driver": Driver(major=7)}, "compute capability 7.0, at least 8.0 is needed"),
        ({"driver": old_driver_without_a_call()}, "The driver knows CUDA 12.4, at least 13.0"),
        ({"core": Broken()}, "cuda.core cannot be loaded (a symbol is missing), for a GPU"),
        ({"pynvml": nvml(GIB // 2)}, "has 512 MiB free, at least 1,024 MiB are needed"),
        (
            {"nvrtc": SimpleNamespace(nvrtcVersion=failing("no libnvrtc"))},
            "NVRTC cannot be loaded (no libnvrtc), for a GPU: pip install 'skim[gpu]'",
        ),
        (
            {"cublasLt": SimpleNamespace(get_version=failing("no libcublasLt,\n  looked in:\n/x"))},
            "cuBLASLt cannot be loaded (no libcublasLt, looked in: /x), for a GPU: pip install",
        ),
    ],
)
def test_reason_to_use_the_cpu_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], reason: str
) -> None:
    report = examine(monkeypatch, **changed)
    assert report["ok"] and report["backend"] == "cpu"
    assert reason in report["reason"]
    (line,) = report["lines"]
    assert line.startswith(report["reason"]) and "the drafter runs on this" in line
    assert "\n" not in line
    json.dumps(report)
