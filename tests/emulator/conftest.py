"""The fixtures through which the emulator's own tests run a probe.

What an instruction does is asked of the emulator and, with `-m gpu`, of a GPU: the emulator is
right when both answer alike. Defects are run on the emulator only.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.device import Device, KernelSource
from kernels.errors import NoDevice
from tests.emulator.build import KERNELS
from tests.emulator.running import PROBES, Run, run_on, run_probe
from tests.tools import require_tool


@pytest.fixture
def run() -> Run:
    """`tests.emulator.running.run_probe`, where there is a compiler."""
    require_tool("g++")
    return run_probe


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def run_both(request: pytest.FixtureRequest) -> Run:
    """The same, or a launch on the GPU, where options of the emulator have no meaning."""
    if request.param == "emulated":
        require_tool("g++")
        return run_probe
    device: Device = request.getfixturevalue("gpu_with_probes")

    def launch(
        source: KernelSource,
        *arguments: Any,
        block: int = 32,
        grid: tuple[int, ...] = (1,),
        shared_bytes: int = 0,
        arch: str = "sm_80",
        **options: Any,
    ) -> list[NDArray[np.generic]]:
        if arch == "sm_90a" and device.arch != arch:
            pytest.skip(f"needs a Hopper GPU, this one is {device.arch}")
        return run_on(device, source, arguments, block, grid, shared_bytes)

    return launch


@pytest.fixture(scope="session")
def gpu_with_probes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """The GPU of this machine, with the probes as its kernels; skips where there is none."""
    folder = tmp_path_factory.mktemp("probes")
    for path in (*KERNELS.glob("*.cuh"), *PROBES.glob("*.cu")):
        shutil.copy(path, folder)
    try:
        from kernels.cuda_device import CudaDevice

        device = CudaDevice(cache_dir=None, sources=folder)
    except (ImportError, NoDevice) as error:
        pytest.skip(f"needs a CUDA device: {error}")
    yield device
    device.close()
