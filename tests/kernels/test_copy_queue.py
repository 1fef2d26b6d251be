"""Pinned memory and the copy queue keep the promises of `kernels.device`.

On the emulated device with memfds and, with `-m gpu`, on a GPU; `test_cuda_device_without_gpu` runs
the latter on a driver without one. A copy there and on the emulated device is as late as may be.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.device import Window
from kernels.errors import HandleError, InvalidArgument
from kernels.ipc.image import Image, create_image, open_image
from kernels.ipc.physical import Region
from tests.emulator.device import EmulatedDevice
from tests.kernels.shared_memory import SIZE, SharedGpu, content, random_bytes

FAKE = bool(os.environ.get("SKIM_FAKE_DRIVER"))


def test_pinned_bytes_arrive_slice_by_slice(
    shared_gpu: SharedGpu, region: Region, window: Window, image: Image
) -> None:
    window.map(region.export())
    pinned = shared_gpu.device.pin(image.bytes_)
    step = SIZE // 8
    marks = [
        shared_gpu.device.copy_in(window.address + begin, pinned, begin, step)
        for begin in range(0, SIZE, step)
    ]
    for i, mark in enumerate(marks):
        shared_gpu.device.wait_for(mark)
        got = content(shared_gpu, window, i * step, step)
        assert np.array_equal(got, image.bytes_[i * step : (i + 1) * step])
    assert marks[-1].seconds_since(marks[0]) >= 0
    pinned.close()


@pytest.mark.parametrize("wait", ["mark", "later mark", "synchronize", "unpin", "unmap", "free"])
def test_copy_has_arrived_when_it_was_waited_for(
    shared_gpu: SharedGpu, region: Region, window: Window, image: Image, wait: str
) -> None:
    device = shared_gpu.device
    window.map(region.export())
    pinned, memory = device.pin(image.bytes_), device.allocate(16)
    mark = device.copy_in(window.address, pinned, 0, SIZE)
    later = device.copy_in(memory.address, pinned, 0, 16)
    {
        "mark": mark.wait,
        "later mark": later.wait,
        "synchronize": device.synchronize,
        "unpin": pinned.close,
        "unmap": window.unmap,
        "free": memory.close,
    }[wait]()
    if wait == "unmap":
        window.map(region.export())
    assert np.array_equal(content(shared_gpu, window), image.bytes_)
    pinned.close()
    memory.close()


def test_work_that_does_not_wait_for_a_copy_reads_what_was_before(
    shared_gpu: SharedGpu, region: Region, window: Window, image: Image
) -> None:
    if not (FAKE or isinstance(shared_gpu.device, EmulatedDevice)):
        pytest.skip("a copy that computes on the GPU may be over by then")
    window.map(region.export())
    pinned = shared_gpu.device.pin(image.bytes_)
    mark = shared_gpu.device.copy_in(window.address, pinned, 0, SIZE)
    before = content(shared_gpu, window)
    shared_gpu.device.wait_for(mark)
    assert not before.any()
    assert np.array_equal(content(shared_gpu, window), image.bytes_)
    pinned.close()


def test_copy_waits_for_the_work_it_comes_after(
    shared_gpu: SharedGpu, region: Region, window: Window, image: Image
) -> None:
    device = shared_gpu.device
    window.map(region.export())
    pinned = device.pin(image.bytes_)
    device.upload(window.address, random_bytes(SIZE, 12))
    device.copy_in(window.address, pinned, 0, SIZE, after=device.record()).wait()
    device.synchronize()
    assert np.array_equal(content(shared_gpu, window), image.bytes_)
    pinned.close()


def test_any_thread_may_map_pin_and_copy(
    shared_gpu: SharedGpu, region: Region, window: Window, image: Image
) -> None:
    """One after another, as a lease's thread and a pass's thread do."""
    failures: list[BaseException] = []

    def unpark() -> None:
        try:
            window.map(region.export())
            pinned = shared_gpu.device.pin(image.bytes_)
            shared_gpu.device.copy_in(window.address, pinned, 0, SIZE).wait()
            pinned.close()
        except BaseException as error:
            failures.append(error)

    for step in (unpark, window.unmap, unpark):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert failures == []
    assert np.array_equal(content(shared_gpu, window), image.bytes_)


@pytest.mark.parametrize("writable", [True, False])
def test_image_is_pinned_writable_or_not(
    shared_gpu: SharedGpu, region: Region, window: Window, writable: bool
) -> None:
    fd = create_image(SIZE)
    image = open_image(fd, writable=writable)
    os.pwrite(fd, b"weights", 1_000)
    os.close(fd)
    window.map(region.export())
    for _ in range(2):  # and again, once it was unpinned
        pinned = shared_gpu.device.pin(image.bytes_)
        shared_gpu.device.copy_in(window.address, pinned, 1_000, 7).wait()
        pinned.close()
        pinned.close()
    assert content(shared_gpu, window, 0, 7).tobytes() == b"weights"
    image.close()


def test_file_on_disk_can_be_the_image(
    shared_gpu: SharedGpu, region: Region, window: Window, tmp_path: Path
) -> None:
    (tmp_path / "model").write_bytes(b"gguf" * 5_000)
    fd = os.open(tmp_path / "model", os.O_RDONLY)
    image = open_image(fd, writable=False)
    os.close(fd)
    window.map(region.export())
    pinned = shared_gpu.device.pin(image.bytes_[32:])  # tensors are aligned to 32 bytes
    shared_gpu.device.copy_in(window.address, pinned, 0, pinned.num_bytes).wait()
    assert content(shared_gpu, window, 0, 4).tobytes() == b"gguf"
    pinned.close()
    image.close()


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((64, 64), np.uint8)[:, :32], "strides"),
        (np.zeros(64, np.float32), "float32"),
        (np.zeros(0, np.uint8), "0 of uint8"),
    ],
)
def test_array_that_cannot_be_pinned_is_refused(
    shared_gpu: SharedGpu, array: NDArray[np.uint8], got: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"array must be .* C-contiguous uint8, got .*{got}"):
        shared_gpu.device.pin(array)


def test_private_mapping_of_a_file_is_refused(shared_gpu: SharedGpu, tmp_path: Path) -> None:
    if not FAKE:
        pytest.skip("a driver of a GPU copies the pages, or hangs")
    (tmp_path / "model").write_bytes(b"gguf" * 5_000)
    private = np.memmap(tmp_path / "model", np.uint8, "c")
    with pytest.raises(HandleError, match="pin: 20,000 writable bytes: .*INVALID_VALUE"):
        shared_gpu.device.pin(private.view(np.ndarray))


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 4), (SIZE - 3, 4), (0, SIZE + 1)])
def test_part_outside_the_pinned_bytes_is_refused(
    shared_gpu: SharedGpu, window: Window, image: Image, offset: int, num_bytes: int
) -> None:
    pinned = shared_gpu.device.pin(image.bytes_)
    allowed = f"range must be inside the {SIZE} pinned bytes, got '{num_bytes} bytes at {offset}'"
    with pytest.raises(InvalidArgument, match=allowed):
        shared_gpu.device.copy_in(window.address, pinned, offset, num_bytes)
    pinned.close()


def test_copy_of_nothing_or_out_of_closed_memory_is_refused(
    shared_gpu: SharedGpu, window: Window, image: Image
) -> None:
    pinned = shared_gpu.device.pin(image.bytes_)
    with pytest.raises(InvalidArgument, match="num_bytes must be at least 1, got 0"):
        shared_gpu.device.copy_in(window.address, pinned, 0, 0)
    pinned.close()
    with pytest.raises(InvalidArgument, match="got '4 bytes at 0, closed'"):
        shared_gpu.device.copy_in(window.address, pinned, 0, 4)
