"""The whole life of leased weights: on the emulated device, a driver without a GPU, and a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernels.errors import NoDevice
from kernels.ipc.fake_physical import FakePhysical
from tests.emulator.device import EmulatedDevice
from tests.fixtures.lease_run import Life, live
from tests.kernels.test_cuda_device_without_gpu import run_on_fake_driver
from tests.tools import require_tool


def check(lived: Life) -> None:
    """Whatever happened in between, the scores are the same bits, and no byte stayed."""
    first, *others = lived.scores
    assert np.isfinite(first.scores).all() and np.ptp(first.scores) > 0.0
    for other in others:
        np.testing.assert_array_equal(other.scores, first.scores)
        np.testing.assert_array_equal(other.panel, first.panel)
    assert lived.freed_bytes == [lived.size_bytes] * 2


async def test_weights_score_the_same_wherever_they_were(folder: Path) -> None:
    require_tool("g++")
    lived = await live(folder, EmulatedDevice(), FakePhysical(64 << 20))
    check(lived)
    assert lived.left_bytes == 0


@pytest.mark.timeout(300)
def test_no_call_of_a_lease_is_refused_by_the_driver(folder: Path) -> None:
    done = run_on_fake_driver(folder, ["tests.fixtures.lease_run", str(folder)])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
async def test_weights_score_the_same_wherever_they_were_on_a_gpu(folder: Path) -> None:
    try:
        from kernels.cuda_device import CudaDevice
        from kernels.ipc.cuda_physical import CudaPhysical

        device, physical = CudaDevice(), CudaPhysical()
    except (ImportError, NoDevice) as error:
        pytest.skip(f"needs a CUDA device: {error}")
    try:
        check(await live(folder, device, physical))
    finally:
        physical.close()
