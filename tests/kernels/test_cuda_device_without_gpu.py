"""CudaDevice on a driver that has no GPU: the real cuda.core, a libcuda of our own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.build import build_shared
from tests.tools import ROOT, require_package, require_tool

pytestmark = pytest.mark.timeout(300)  # each starts a process; a pass compiles all of its kernels


def build_fake_driver(folder: Path) -> None:
    """Put tests/fixtures/fake_driver*.cpp into a folder as libcuda.so.1, and as NVML."""
    sources = sorted((ROOT / "tests/fixtures").glob("fake_driver*"))
    command = [require_tool("g++"), "-shared", "-fPIC", "-O1", "-std=c++17"]
    command += ["-Wl,-soname,libcuda.so.1", *(str(s) for s in sources if s.suffix == ".cpp")]
    library, log = build_shared("fake-driver", command, [s.read_text() for s in sources])
    assert not log, log
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (folder / name).symlink_to(library)


def run_on_fake_driver(
    folder: Path, module: list[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python module, with its arguments, where libcuda is the fake driver."""
    require_package("cuda.core", "nvidia-cuda-nvrtc")
    require_package("nvmath.bindings", "nvmath-python")
    require_package("pynvml", "nvidia-ml-py")
    build_fake_driver(folder)
    return subprocess.run(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "files",
    [
        ("test_cuda_device.py",),
        ("test_windows.py", "test_copy_queue.py", "test_cuda_physical.py"),
        ("test_cuda_legacy.py",),
    ],
)
def test_device_passes_its_tests_on_a_driver_without_a_gpu(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    command = ["pytest", "-rs", "-m", "gpu", *(f"tests/kernels/{file}" for file in files)]
    done = run_on_fake_driver(tmp_path, command, SKIM_FAKE_DRIVER="1")
    assert done.returncode == 0, done.stdout + done.stderr
    skips = re.findall(r"SKIPPED.*", done.stdout)
    assert all("computes on the GPU" in line for line in skips), done.stdout


@pytest.mark.parametrize(("capability", "arch"), [("8", "sm_80"), ("9", "sm_90a")])
def test_whole_pass_makes_no_call_that_the_driver_refuses(
    tmp_path: Path, capability: str, arch: str
) -> None:
    command = ["tests.fixtures.pass_without_gpu", str(tmp_path), "128", "1100"]
    done = run_on_fake_driver(tmp_path, command, FAKE_CAPABILITY=capability)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [arch, "35"]  # chunks of 32


def test_gpu_older_than_bf16_is_no_device(tmp_path: Path) -> None:
    code = "from kernels.cuda_device import CudaDevice; CudaDevice()"
    (tmp_path / "open_it.py").write_text(code)
    environment = {"FAKE_CAPABILITY": "7", "PYTHONPATH": str(tmp_path)}
    done = run_on_fake_driver(tmp_path, ["open_it"], **environment)
    assert "NoDevice: device: Fake GPU has compute capability 7.0, at least 8.0" in done.stderr


def test_user_without_a_home_gets_a_device_that_keeps_no_kernels(tmp_path: Path) -> None:
    """A uid that no list of users has; `Path.home` then has nowhere to look."""
    (tmp_path / "open_it.py").write_text(
        "import os\n"
        "os.environ.pop('HOME', None), os.environ.pop('XDG_CACHE_HOME', None)\n"
        "import pwd\n"
        "pwd.getpwuid = lambda uid: {}[uid]\n"
        "from kernels.compiler import default_cache_dir\n"
        "from kernels.cuda_device import CudaDevice\n"
        "CudaDevice().close()\n"
        "print(default_cache_dir())\n"
    )
    done = run_on_fake_driver(tmp_path, ["open_it"], PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ["None"], done.stderr
