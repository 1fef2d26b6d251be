"""CudaDevice on a driver that has no GPU: the real cuda.core, a libcuda of our own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.tools import ROOT, require_package, require_tool


def build_fake_driver(folder: Path) -> Path:
    """Build tests/fixtures/fake_driver.cpp as libcuda.so.1 in a folder."""
    library = folder / "libcuda.so.1"
    source = ROOT / "tests/fixtures/fake_driver.cpp"
    command = [require_tool("g++"), "-shared", "-fPIC", "-O1", "-std=c++17"]
    command += ["-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return library


def test_device_passes_its_tests_on_a_driver_without_a_gpu(tmp_path: Path) -> None:
    require_package("cuda.core", "nvidia-cuda-nvrtc")
    build_fake_driver(tmp_path)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "SKIM_FAKE_DRIVER": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "tests/kernels/test_cuda_device.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    skips = re.findall(r"SKIPPED.*", done.stdout)
    assert all("computes on the GPU" in line for line in skips), done.stdout
