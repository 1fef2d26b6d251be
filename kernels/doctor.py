"""Say in JSON what the kernels can run on: is `cuda` importable, and which devices are there.

`python -m kernels.doctor` prints one JSON object; `skim doctor` runs it as a child process, so a
missing extra or a broken driver is a line in its report. Never raises for what it finds.
"""

from __future__ import annotations

import importlib
import json
import platform
from typing import Any


def examine() -> dict[str, Any]:
    """Look for CUDA and describe each device.

    Returns:
        `package`, `ok` (True: every found device is usable, or there is none and the CPU serves),
        `backend` (`cuda` or `cpu`), `cuda_importable`, `devices` (name, compute_capability,
        memory_bytes), `lines` (sentences for people), `numpy`.
    """
    numpy = importlib.import_module("numpy")
    report: dict[str, Any] = {
        "package": "kernels",
        "ok": True,
        "backend": "cpu",
        "cuda_importable": False,
        "devices": [],
        "lines": [],
        "numpy": numpy.__version__,
    }
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        report["lines"].append(
            f"The cuda package is not installed ({error}); the drafter runs on this "
            f"{platform.machine()} CPU. For a GPU: pip install 'skim[gpu]'."
        )
        return report
    report["cuda_importable"] = True
    try:
        report["devices"] = _devices(driver)
    except RuntimeError as error:
        report["lines"].append(f"No usable GPU: {error}; the drafter runs on the CPU.")
        return report
    if report["devices"]:
        report["backend"] = "cuda"
        report["lines"].append(f"{len(report['devices'])} CUDA device(s) found.")
    else:
        report["lines"].append("The CUDA driver lists no device; the drafter runs on the CPU.")
    return report


def _devices(driver: Any) -> list[dict[str, Any]]:
    def call(name: str, *arguments: Any) -> Any:
        status, *values = getattr(driver, name)(*arguments)
        if int(status) != 0:
            raise RuntimeError(f"{name} failed with {status.name}")
        return values[0] if values else None

    call("cuInit", 0)
    major, minor = (
        driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    )
    devices = []
    for ordinal in range(call("cuDeviceGetCount")):
        device = call("cuDeviceGet", ordinal)
        capability = [call("cuDeviceGetAttribute", which, device) for which in (major, minor)]
        devices.append(
            {
                "name": call("cuDeviceGetName", 128, device).split(b"\0")[0].decode(),
                "compute_capability": f"{capability[0]}.{capability[1]}",
                "memory_bytes": int(call("cuDeviceTotalMem", device)),
            }
        )
    return devices


if __name__ == "__main__":
    print(json.dumps(examine()))
