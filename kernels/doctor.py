"""Say in JSON what the kernels can run on, and why not on a GPU where they cannot.

`python -m kernels.doctor` prints one JSON object; `skim doctor` runs it as a child process, so a
missing extra or a broken driver is a line in its report. Where there is a GPU it also tries, for a
few seconds, each way to share its memory between two processes, and prints an object for each.
`examine` takes no memory of a GPU and makes no context. Never raises for what it finds: each reason
becomes one sentence.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from typing import Any

from kernels.ipc.transports import try_transports
from kernels.specialisation import OLDEST_CAPABILITY, arch_of

OLDEST_CUDA = (13, 0)  # that a driver must know: what the installed bindings call
LEAST_FREE_BYTES = 1 << 30  # a context alone takes 524 MiB; a model's need is known to its loader
INSTALL = "pip install 'skim[gpu]'"
NOT_TRIED = "Nothing here runs on a GPU, so no transport of its memory was tried."


class _Unusable(Exception):
    """Why kernels cannot run on a GPU, for people: one line, whatever a library said in several."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


def examine() -> dict[str, Any]:
    """Look for a GPU and for everything that kernels need on it.

    Returns:
        `package`, `ok` (True: a GPU can be used, or the CPU serves), `backend` (`cuda` or `cpu`),
        `reason` (why the CPU; empty for a GPU), `cuda_importable`, `devices` (name,
        compute_capability, arch, memory_bytes, free_bytes or None), `driver` and `cuda` (versions),
        `nvrtc`, `cublaslt` (versions or None), `lines` (sentences for people), `numpy`.
    """
    report: dict[str, Any] = {
        "package": "kernels",
        "ok": True,
        "backend": "cpu",
        "reason": "",
        "cuda_importable": False,
        "devices": [],
        "driver": None,
        "cuda": None,
        "nvrtc": None,
        "cublaslt": None,
        "lines": [],
        "numpy": importlib.import_module("numpy").__version__,
    }
    try:
        _look(report)
    except _Unusable as reason:
        report["reason"] = str(reason)
        report["lines"].append(f"{reason}; the drafter runs on this {platform.machine()} CPU.")
        return report
    report["backend"] = "cuda"
    gpu = report["devices"][0]
    free = gpu["free_bytes"]
    memory = f"{gpu['memory_bytes'] / 2**30:.1f} GiB"
    if free is not None:
        memory = f"{free / 2**30:.1f} of {memory} free"
    report["lines"].append(
        f"{gpu['name']}, {memory}, kernels for {gpu['arch']}, CUDA {report['cuda']}, "
        f"NVRTC {report['nvrtc']}, cuBLASLt {report['cublaslt']}."
    )
    return report


def _look(report: dict[str, Any]) -> None:
    """Fill the report in; _Unusable at the first thing that rules a GPU out."""
    driver = _import("cuda.bindings.driver")
    report["cuda_importable"] = True
    try:
        _call(driver, "cuInit", 0)
        version = int(_call(driver, "cuDriverGetVersion"))
        report["cuda"] = f"{version // 1000}.{version % 1000 // 10}"
        count = int(_call(driver, "cuDeviceGetCount"))
        report["devices"] = [_describe(driver, ordinal) for ordinal in range(count)]
    except Exception as error:  # the bindings raise their own kinds where there is no driver
        _require_driver(report["cuda"])  # an old one may lack a call that is asked for here
        raise _Unusable(f"No usable GPU: {str(error).rstrip('.')}") from error
    if not report["devices"]:
        raise _Unusable("The CUDA driver lists no device")
    _add_memory_counters(report)
    _require_driver(report["cuda"])
    _require_usable(report["devices"][0])
    report["nvrtc"] = _nvrtc_version()
    report["cublaslt"] = _cublaslt_version()
    _import("cuda.core")


def _require_driver(cuda: str | None) -> None:
    if cuda is not None and tuple(map(int, cuda.split("."))) < OLDEST_CUDA:
        oldest = "{}.{}".format(*OLDEST_CUDA)
        raise _Unusable(f"The driver knows CUDA {cuda}, at least {oldest} is needed")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _Unusable(f"{name} is not installed ({error}), for a GPU: {INSTALL}") from error
    except Exception as error:  # a module may raise anything where its library is broken
        raise _Unusable(f"{name} cannot be loaded ({error}), for a GPU: {INSTALL}") from error


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    status, *values = getattr(driver, name)(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"{name} failed with {status.name}")
    return values[0] if values else None


def _describe(driver: Any, ordinal: int) -> dict[str, Any]:
    device = _call(driver, "cuDeviceGet", ordinal)
    kinds = driver.CUdevice_attribute
    major, minor = (
        int(_call(driver, "cuDeviceGetAttribute", kind, device))
        for kind in (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return {
        "name": _call(driver, "cuDeviceGetName", 128, device).split(b"\0")[0].decode(),
        "compute_capability": f"{major}.{minor}",
        "arch": arch_of(major, minor),
        "memory_bytes": int(_call(driver, "cuDeviceTotalMem", device)),
        "free_bytes": None,
        "pci_bus": _call(driver, "cuDeviceGetPCIBusId", 32, device).split(b"\0")[0].decode(),
    }


def _add_memory_counters(report: dict[str, Any]) -> None:
    """Free bytes and the driver's version, from NVML: it needs no context. Left out without it."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        report["driver"] = str(nvml.nvmlSystemGetDriverVersion())
        for device in report["devices"]:
            handle = nvml.nvmlDeviceGetHandleByPciBusId(device["pci_bus"])
            device["free_bytes"] = int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
    except Exception:  # a counter that cannot be read rules nothing out
        return


def _require_usable(device: dict[str, Any]) -> None:
    name, capability = device["name"], device["compute_capability"]
    if tuple(map(int, capability.split("."))) < OLDEST_CAPABILITY:
        oldest = "{}.{}".format(*OLDEST_CAPABILITY)
        raise _Unusable(f"{name} has compute capability {capability}, at least {oldest} is needed")
    free = device["free_bytes"]
    if free is None:
        free = device["memory_bytes"]
    if free < LEAST_FREE_BYTES:
        raise _Unusable(
            f"{name} has {free / 2**20:,.0f} MiB free, "
            f"at least {LEAST_FREE_BYTES / 2**20:,.0f} MiB are needed"
        )


def _nvrtc_version() -> str:
    nvrtc = _import("cuda.bindings.nvrtc")
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings raise their own kinds where there is no library
        raise _Unusable(f"NVRTC cannot be loaded ({error}), for a GPU: {INSTALL}") from error
    if int(status) != 0:
        raise _Unusable(f"NVRTC does not answer: {status.name}")
    return f"{major}.{minor}"


def _cublaslt_version() -> str:
    lt = _import("nvmath.bindings.cublasLt")
    try:
        version = int(lt.get_version())
    except Exception as error:  # the bindings raise their own kinds where there is no library
        raise _Unusable(f"cuBLASLt cannot be loaded ({error}), for a GPU: {INSTALL}") from error
    return f"{version // 10000}.{version % 10000 // 100}.{version % 100}"


def examine_transports() -> list[dict[str, Any]]:
    """Try each way to share the GPU's memory between two processes.

    Returns:
        For each `package`, `transport`, `ok` (None where it does not work: a drafter without it
        keeps its memory itself), `lines`, `advice`, and what `kernels.ipc.trial.landlord` found.
    """
    trials = try_transports()
    working = [trial["transport"] for trial in trials if trial["ok"]]
    if working:
        advice = f"on one GPU, let the target use {working[0]}: SKIM_TARGET_MEMORY_TRANSPORT"
    else:
        advice = "drafter and target cannot share a GPU here: leave both memory sockets unset"
    return [
        {
            **trial,
            "package": "kernels",
            "ok": trial["ok"] or None,
            "lines": [trial["line"]],
            "advice": "" if trial["ok"] else advice,
        }
        for trial in trials
    ]


def main() -> int:
    """Print the reports."""
    report = examine()
    on_gpu = report["backend"] == "cuda"
    if not on_gpu:
        report["lines"].append(NOT_TRIED)
    print(json.dumps(report), flush=True)
    for trial in examine_transports() if on_gpu else ():
        print(json.dumps(trial), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
