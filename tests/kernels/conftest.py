"""The devices that kernel tests run on: always the emulated one, and the GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from kernels.device import Device, Window
from kernels.errors import NoDevice
from kernels.ipc.fake_physical import FakePhysical
from kernels.ipc.image import Image, create_image, open_image
from kernels.ipc.physical import Region, open_physical
from tests.emulator.device import EmulatedDevice
from tests.kernels.shared_memory import SIZE, SharedGpu, random_bytes
from tests.tools import require_tool

GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="session")
def cuda_device() -> Iterator[Device]:
    """The GPU of this machine, opened once; skips where there is none."""
    try:
        from kernels.cuda_device import CudaDevice

        device = CudaDevice()
    except (ImportError, NoDevice) as error:
        pytest.skip(f"needs a CUDA device: {error}")
    yield device
    device.close()


@pytest.fixture(params=["emulated", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device for the portable kernels, with no memory taken."""
    yield from _opened(request, "sm_80")


@pytest.fixture(params=["emulated", GPU])
def hopper_device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device for the kernels that need TMA and wgmma; a GPU of another kind is skipped."""
    yield from _opened(request, "sm_90a")


def _opened(request: pytest.FixtureRequest, arch: str) -> Iterator[Device]:
    if request.param == "emulated":
        require_tool("g++")
        emulated = EmulatedDevice(arch)
        yield emulated
        emulated.close()
        return
    device: Device = request.getfixturevalue("cuda_device")
    if arch == "sm_90a" and device.arch != arch:
        pytest.skip(f"needs a Hopper GPU, this one is {device.arch}")
    yield device


@pytest.fixture(params=["emulated", GPU])
def shared_gpu(request: pytest.FixtureRequest) -> Iterator[SharedGpu]:
    """Both sides in one process; each test gives back what it takes."""
    if request.param == "emulated":
        require_tool("g++")
        emulated = EmulatedDevice()
        yield SharedGpu(FakePhysical(1 << 30), emulated)
        emulated.close()
        return
    device: Device = request.getfixturevalue("cuda_device")
    physical = open_physical()
    gpu = SharedGpu(physical, device)
    _use_once(gpu)
    yield gpu
    physical.close()


def _use_once(gpu: SharedGpu) -> None:
    """What a driver opens and takes at the first use, a test must not count as a leak."""
    region = gpu.physical.create(gpu.physical.granularity_bytes)
    window = gpu.device.reserve(region.size_bytes)
    window.map(region.export())
    pinned = gpu.device.pin(np.zeros(8, np.uint8))
    gpu.device.copy_in(window.address, pinned, 0, 8).wait()
    gpu.device.fill(window.address, 8)
    for part in (pinned, window, region):
        part.close()


@pytest.fixture
def region(shared_gpu: SharedGpu) -> Iterator[Region]:
    """Physical memory of SIZE bytes."""
    made = shared_gpu.physical.create(SIZE)
    yield made
    made.close()


@pytest.fixture
def window(shared_gpu: SharedGpu) -> Iterator[Window]:
    """Addresses for it, with nothing behind them."""
    made = shared_gpu.device.reserve(SIZE)
    yield made
    made.close()


@pytest.fixture
def image() -> Iterator[Image]:
    """Seeded bytes, mapped read-only, as a tenant has them."""
    fd = create_image(SIZE)
    written = open_image(fd, writable=True)
    written.bytes_[:] = random_bytes(SIZE)
    written.close()
    opened = open_image(fd, writable=False)
    os.close(fd)
    yield opened
    opened.close()
