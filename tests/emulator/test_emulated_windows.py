"""Kernels and windows on the emulated device: what lies behind the addresses, and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kernels.device import KernelSource, Window
from kernels.errors import InvalidArgument, LaunchError
from kernels.ipc.fake_physical import FakePhysical, FakeRegion
from tests.emulator.device import EmulatedDevice
from tests.tools import require_tool

SIZE = 2 << 20
ADD = KernelSource("add.cu", "add")
TEXT = """#include "common.cuh"
extern "C" __global__ void add(float* values, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) values[i] += 1.0f;
}
"""


@pytest.fixture
def device(tmp_path: Path) -> Iterator[EmulatedDevice]:
    require_tool("g++")
    (tmp_path / "add.cu").write_text(TEXT)
    made = EmulatedDevice(folder=tmp_path)
    yield made
    made.close()


@pytest.fixture
def region() -> Iterator[FakeRegion]:
    made = FakePhysical(SIZE).create(SIZE)
    yield made
    made.close()


@pytest.fixture
def window(device: EmulatedDevice, region: FakeRegion) -> Window:
    """A window with the region behind it."""
    made = device.reserve(SIZE)
    made.map(region.export())
    return made


@pytest.mark.parametrize("workers", [1, 2])
def test_kernel_reads_and_writes_a_region(
    device: EmulatedDevice, window: Window, workers: int
) -> None:
    device.workers = workers
    device.launch(ADD, (1,), 32, (window.address, np.int32(SIZE // 4)))
    got = np.zeros(SIZE // 4, np.float32)
    device.download(window.address, got)
    assert (got == 1).all()


def test_race_check_covers_a_region(
    device: EmulatedDevice, window: Window, region: FakeRegion
) -> None:
    device.check_races = True
    device.launch(ADD, (2,), 32, (window.address, np.int32(100)))
    got = np.zeros(101, np.float32)
    device.download(window.address, got)
    assert (got[:100] == 2).all() and got[100] == 0


def test_kernel_past_the_end_of_a_region_is_refused(device: EmulatedDevice, window: Window) -> None:
    with pytest.raises(LaunchError, match=f"0 bytes past the end of the {SIZE} bytes"):
        device.launch(ADD, (1,), 1, (window.address, np.int32(SIZE // 4 + 1)))


def test_kernel_on_a_parked_window_is_refused(device: EmulatedDevice, window: Window) -> None:
    window.unmap()
    with pytest.raises(LaunchError, match=r"argument 0, 0x\w+, is no device pointer"):
        device.launch(ADD, (1,), 32, (window.address, np.int32(1)))


def test_copies_to_and_from_a_parked_window_are_refused(
    device: EmulatedDevice, window: Window
) -> None:
    window.unmap()
    pinned, host = device.pin(np.ones(8, np.uint8)), np.ones(8, np.uint8)
    for touch in (
        lambda: device.copy_in(window.address, pinned, 0, 8),
        lambda: device.upload(window.address, host),
        lambda: device.download(window.address, host),
        lambda: device.fill(window.address, 8),
    ):
        with pytest.raises(InvalidArgument, match="the range must be inside one allocation"):
            touch()


def test_mapped_region_is_not_free(device: EmulatedDevice, window: Window) -> None:
    assert device.free_bytes() == device.total_bytes - SIZE
    window.unmap()
    assert device.free_bytes() == device.total_bytes


def test_marks_of_copies_may_be_waited_for_in_any_order(
    device: EmulatedDevice, window: Window
) -> None:
    pinned = device.pin(np.arange(8, dtype=np.uint8))
    marks = [device.copy_in(window.address + i, pinned, i, 1) for i in range(8)]
    got = np.zeros(8, np.uint8)
    for i in (3, 1, 7, 7):
        marks[i].wait()
        device.download(window.address, got)
        done = max(i, 3) + 1
        assert got.tolist() == [*range(done), *[0] * (8 - done)]
