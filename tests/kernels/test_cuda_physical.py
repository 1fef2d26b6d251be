"""A GPU's physical memory says in a sentence why it cannot be had, and closes what it opened.

What each call promises stands in test_windows.py. The tests marked `gpu` run on a driver without
one, in a process of their own (`test_cuda_device_without_gpu`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kernels.errors import HandleError, KernelError, LaunchError, NoDevice
from kernels.ipc.physical import Physical, open_physical
from tests.tools import ROOT

if TYPE_CHECKING:
    from kernels.cuda_device import CudaDevice

SIZE = 4 << 20
only_fake = pytest.mark.skipif(
    not os.environ.get("SKIM_FAKE_DRIVER"), reason="asks the driver of tests/fixtures to fail"
)


@pytest.fixture
def physical() -> Iterator[Physical]:
    made = open_physical()
    yield made
    made.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[CudaDevice]:
    from kernels.cuda_device import CudaDevice

    (tmp_path / "small.cu").write_text('extern "C" __global__ void fail() {}')
    made = CudaDevice(cache_dir=None, sources=tmp_path)
    yield made
    made.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_machine_without_a_usable_gpu_has_no_device() -> None:
    code = "from kernels.ipc.physical import open_physical; open_physical()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert "NoDevice: device: " in done.stderr, done.stderr


def test_machine_without_the_packages_has_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kernels.ipc.cuda_physical", raising=False)
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(NoDevice, match=r"cuda-python is not installed .*'skim\[gpu\]'"):
        open_physical()


@pytest.mark.gpu
@only_fake
def test_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(NoDevice, match="GPU 3 cannot be used: .*INVALID_DEVICE"):
        open_physical(3)


@pytest.mark.gpu
@only_fake
def test_machine_without_memory_counters_has_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoDevice, match=r"nvidia-ml-py is not installed .*'skim\[gpu\]'"):
        open_physical()


@pytest.mark.gpu
@only_fake
def test_driver_without_nvml_has_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    with pytest.raises(NoDevice, match="nvml: cannot be used to count memory: NVML Shared Library"):
        open_physical()


@pytest.mark.gpu
@only_fake
def test_gpu_that_is_lost_says_so_when_it_is_counted(
    physical: Physical, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LOST", "1")
    with pytest.raises(NoDevice, match="nvml: the GPU does not say its memory: GPU is lost"):
        physical.used_bytes()


@pytest.mark.gpu
@only_fake
def test_closed_gpu_counts_nothing(physical: Physical) -> None:
    for _ in range(2):
        physical.close()
    with pytest.raises(NoDevice, match="the GPU was closed"):
        physical.used_bytes()


@pytest.mark.gpu
@only_fake
def test_landlord_loads_neither_launches_nor_streams() -> None:
    code = "import sys; from kernels.ipc.physical import open_physical; open_physical().close()"
    code += "; assert 'cuda.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.gpu
@only_fake
def test_region_that_cannot_be_accessed_is_let_go_at_once(
    physical: Physical, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, fds = physical.used_bytes(), open_fds()
    region, window = physical.create(SIZE), device.reserve(SIZE)
    monkeypatch.setenv("FAKE_NO_ACCESS", "1")
    with pytest.raises(HandleError, match="set access: failed with CUDA_ERROR_INVALID_VALUE"):
        window.map(region.export())
    assert not window.mapped
    monkeypatch.delenv("FAKE_NO_ACCESS")
    window.map(region.export())
    window.close()
    region.close()
    assert (physical.used_bytes(), open_fds()) == (used, fds)


@pytest.mark.gpu
@only_fake
def test_window_lets_its_region_go_after_a_failed_kernel_too(
    physical: Physical, device: CudaDevice
) -> None:
    from kernels.device import KernelSource

    used = physical.used_bytes()
    region, window = physical.create(SIZE), device.reserve(SIZE)
    window.map(region.export())
    region.close()
    device.launch(KernelSource("small.cu", "fail"), (1,), 32, ())
    with pytest.raises(LaunchError, match="fail: .*ILLEGAL_ADDRESS"):
        window.unmap()
    assert not window.mapped and physical.used_bytes() == used


@pytest.mark.gpu
@only_fake
def test_copy_into_a_window_without_memory_is_refused(device: CudaDevice) -> None:
    window, pinned = device.reserve(SIZE), device.pin(np.ones(8, np.uint8))
    with pytest.raises(KernelError, match="copy_in: failed with CUDA_ERROR_INVALID_VALUE"):
        device.copy_in(window.address, pinned, 0, 8)


@pytest.mark.gpu
@only_fake
def test_array_stays_alive_as_long_as_it_is_pinned(device: CudaDevice) -> None:
    """Its pages are the driver's to read until then."""
    array = np.zeros(1 << 20, np.uint8)
    held = sys.getrefcount(array)
    pinned = device.pin(array)
    assert sys.getrefcount(array) > held
    pinned.close()
    assert sys.getrefcount(array) == held


@pytest.mark.gpu
@only_fake
def test_copy_queue_may_be_made_in_another_thread(device: CudaDevice) -> None:
    memory, got = device.allocate(8), np.zeros(8, np.uint8)

    def copy() -> None:
        device.copy_in(memory.address, device.pin(np.ones(8, np.uint8)), 0, 8).wait()

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    device.download(memory.address, got)
    assert got.all()


@pytest.mark.gpu
@only_fake
def test_device_forgets_windows_and_pins_that_were_closed(device: CudaDevice) -> None:
    for _ in range(5):
        device.reserve(SIZE).close()
        device.pin(np.zeros(8, np.uint8)).close()
    kept = device.reserve(SIZE)
    assert device._shared == [kept]
