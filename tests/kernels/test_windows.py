"""Windows and regions keep the promises of `kernels.device` and `kernels.ipc`.

On the emulated device with memfds and, with `-m gpu`, on a GPU; `test_cuda_device_without_gpu` runs
the latter on a driver without one. Bytes are counted by the landlord's side in every test.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

import numpy as np
import pytest

from kernels.device import Window
from kernels.errors import HandleError, InvalidArgument, OutOfMemory
from kernels.ipc.physical import Region
from tests.emulator.device import EmulatedDevice
from tests.kernels.shared_memory import SIZE, SharedGpu, content, random_bytes

MIB = 1 << 20
COUNTED = 64 * MIB  # where bytes are counted: page tables of a GPU take or give 2 MiB now and then
NOISE = 2 * MIB


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- who holds the bytes ----------------------------------------------------------------------

LetGo = Callable[[], None]


def nobody(gpu: SharedGpu, region: Region) -> LetGo:
    return lambda: None


def exported_descriptor(gpu: SharedGpu, region: Region) -> LetGo:
    fd = region.export()
    return lambda: os.close(fd)


def received_descriptor(gpu: SharedGpu, region: Region) -> LetGo:
    here, there = socket.socketpair()
    fd = region.export()
    socket.send_fds(here, [b"-"], [fd])
    os.close(fd)
    _, received, _, _ = socket.recv_fds(there, 1, 1)
    here.close()
    there.close()
    return lambda: os.close(received[0])


def unread_descriptor(gpu: SharedGpu, region: Region) -> LetGo:
    here, there = socket.socketpair()
    fd = region.export()
    socket.send_fds(here, [b"-"], [fd])
    os.close(fd)
    here.close()
    return there.close


def imported_handle(gpu: SharedGpu, region: Region) -> LetGo:
    fd = region.export()
    if isinstance(gpu.device, EmulatedDevice):  # a handle is a second descriptor of the same export
        handle = os.dup(fd)
        os.close(fd)
        return lambda: os.close(handle)
    from cuda.bindings import driver

    from kernels.cuda_calls import FILE_DESCRIPTOR

    gpu.device.free_bytes()  # makes the context current
    status, imported = driver.cuMemImportFromShareableHandle(fd, FILE_DESCRIPTOR)
    os.close(fd)
    assert int(status) == 0

    def release() -> None:
        assert int(driver.cuMemRelease(imported)[0]) == 0

    return release


def mapping(gpu: SharedGpu, region: Region) -> LetGo:
    window = gpu.device.reserve(COUNTED)
    window.map(region.export())

    def unmap() -> None:
        window.unmap()
        assert not window.mapped
        window.close()

    return unmap


@pytest.mark.parametrize(
    ("hold", "held_bytes"),
    [
        (nobody, 0),
        (exported_descriptor, COUNTED),
        (received_descriptor, COUNTED),
        (unread_descriptor, COUNTED),
        (imported_handle, COUNTED),
        (mapping, COUNTED),
    ],
)
def test_region_that_was_let_go_lives_as_long_as_someone_holds_it(
    shared_gpu: SharedGpu, hold: Callable[[SharedGpu, Region], LetGo], held_bytes: int
) -> None:
    physical = shared_gpu.physical
    used = [physical.used_bytes()]
    region = physical.create(COUNTED)
    let_go = hold(shared_gpu, region)
    used.append(physical.used_bytes())
    region.close()
    used.append(physical.used_bytes())
    let_go()
    used.append(physical.used_bytes())
    assert np.diff(used) == pytest.approx([COUNTED, held_bytes - COUNTED, -held_bytes], abs=NOISE)


def test_mapping_alone_holds_a_region(
    shared_gpu: SharedGpu, region: Region, window: Window
) -> None:
    before = open_fds()
    window.map(region.export())
    assert window.mapped and open_fds() == before


def test_device_that_closes_lets_its_regions_go(shared_gpu: SharedGpu) -> None:
    region = shared_gpu.physical.create(COUNTED)
    if isinstance(shared_gpu.device, EmulatedDevice):
        device = EmulatedDevice()
    else:
        from kernels.cuda_device import CudaDevice

        device = CudaDevice(cache_dir=None)
    device.reserve(COUNTED).map(region.export())
    device.pin(np.zeros(SIZE, np.uint8))
    used = shared_gpu.physical.used_bytes()
    region.close()
    device.close()
    freed = used - shared_gpu.physical.used_bytes()
    assert freed == pytest.approx(COUNTED, abs=NOISE)


def test_cycles_leave_no_byte_and_no_descriptor(shared_gpu: SharedGpu, window: Window) -> None:
    used, fds, address = shared_gpu.physical.used_bytes(), open_fds(), window.address
    for _ in range(200):
        region = shared_gpu.physical.create(SIZE)
        window.map(region.export())
        window.unmap()
        region.close()
    assert shared_gpu.physical.used_bytes() == pytest.approx(used, abs=NOISE)
    assert (open_fds(), window.address) == (fds, address)


# ---- what is behind a window ------------------------------------------------------------------


def test_new_region_is_zero_whatever_was_there_before(
    shared_gpu: SharedGpu, window: Window
) -> None:
    for _ in range(2):
        region = shared_gpu.physical.create(SIZE)
        window.map(region.export())
        region.close()
        assert not content(shared_gpu, window).any()
        shared_gpu.device.fill(window.address, SIZE, 0xEE)
        window.unmap()


def test_region_keeps_its_content_for_the_next_tenant(
    shared_gpu: SharedGpu, region: Region, window: Window
) -> None:
    sent = random_bytes(SIZE)
    window.map(region.export())
    shared_gpu.device.upload(window.address, sent)
    window.close()
    successor = shared_gpu.device.reserve(SIZE)
    successor.map(region.export())
    assert np.array_equal(content(shared_gpu, successor), sent)
    successor.close()


def test_window_is_rounded_up_to_what_a_landlord_creates(shared_gpu: SharedGpu) -> None:
    window = shared_gpu.device.reserve(shared_gpu.physical.granularity_bytes + 1)
    assert window.size_bytes == 2 * shared_gpu.physical.granularity_bytes
    assert not window.mapped and window.address % 256 == 0
    window.close()


def test_window_of_no_bytes_is_refused(shared_gpu: SharedGpu) -> None:
    with pytest.raises(InvalidArgument, match="size_bytes must be at least 1, got 0"):
        shared_gpu.device.reserve(0)


def test_closed_and_unmapped_twice_is_closed(
    shared_gpu: SharedGpu, region: Region, window: Window
) -> None:
    window.map(region.export())
    for _ in range(2):
        window.unmap()
    for _ in range(2):
        window.close()
        region.close()
    assert not window.mapped


# ---- refusals: the descriptor is closed in every case ------------------------------------------


def no_region(gpu: SharedGpu, window: Window) -> int:
    return os.open("/dev/null", os.O_RDWR)


def smaller_region(gpu: SharedGpu, window: Window) -> int:
    region = gpu.physical.create(COUNTED // 2)
    fd = region.export()
    region.close()
    return fd


def into_mapped_window(gpu: SharedGpu, window: Window) -> int:
    region = gpu.physical.create(COUNTED)
    window.map(region.export())
    fd = region.export()
    region.close()
    return fd


def into_closed_window(gpu: SharedGpu, window: Window) -> int:
    window.close()
    region = gpu.physical.create(COUNTED)
    fd = region.export()
    region.close()
    return fd


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (no_region, "region"),
        (smaller_region, "no region of 67,108,864 bytes"),
        (into_mapped_window, "the window is mapped already"),
        (into_closed_window, "the window is closed"),
    ],
)
def test_descriptor_that_cannot_be_mapped_is_closed_and_holds_nothing(
    shared_gpu: SharedGpu, prepare: Callable[[SharedGpu, Window], int], message: str
) -> None:
    used, fds = shared_gpu.physical.used_bytes(), open_fds()
    window = shared_gpu.device.reserve(COUNTED)
    fd = prepare(shared_gpu, window)
    mapped = window.mapped
    with pytest.raises(HandleError, match=message):
        window.map(fd)
    assert window.mapped == mapped
    with pytest.raises(OSError):
        os.fstat(fd)
    window.close()
    assert shared_gpu.physical.used_bytes() == pytest.approx(used, abs=NOISE)
    assert open_fds() == fds


@pytest.mark.parametrize("fd", [-1, 987_654])
def test_number_that_is_no_descriptor_is_refused(window: Window, fd: int) -> None:
    with pytest.raises(HandleError, match="region"):
        window.map(fd)


def test_window_takes_a_region_after_a_refusal(
    shared_gpu: SharedGpu, region: Region, window: Window
) -> None:
    with pytest.raises(HandleError):
        window.map(os.open("/dev/null", os.O_RDWR))
    window.map(region.export())
    shared_gpu.device.fill(window.address, SIZE, 3)
    assert (content(shared_gpu, window) == 3).all()


@pytest.mark.parametrize("size_bytes", [0, -2 * MIB, 2 * MIB + 4096])
def test_region_of_odd_size_is_refused(shared_gpu: SharedGpu, size_bytes: int) -> None:
    allowed = f"size_bytes must be a positive multiple of 2,097,152, got {size_bytes}"
    with pytest.raises(InvalidArgument, match=allowed):
        shared_gpu.physical.create(size_bytes)


def test_region_that_does_not_fit_says_what_is_free(shared_gpu: SharedGpu) -> None:
    physical = shared_gpu.physical
    asked = (physical.total_bytes // (2 * MIB) + 1) * 2 * MIB
    free = physical.total_bytes - physical.used_bytes()
    with pytest.raises(OutOfMemory, match=f"asked for {asked:,} bytes, {free:,} are free"):
        physical.create(asked)
    physical.create(2 * MIB).close()


def test_closed_region_exports_nothing(region: Region) -> None:
    region.close()
    with pytest.raises(HandleError, match="the region of 4,194,304 bytes is closed"):
        region.export()


def test_exported_descriptor_stays_out_of_children(region: Region) -> None:
    fd = region.export()
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_both_sides_name_the_same_gpu(shared_gpu: SharedGpu) -> None:
    assert shared_gpu.physical.uuid == shared_gpu.device.uuid
    assert shared_gpu.physical.uuid.startswith("GPU-") and len(shared_gpu.physical.uuid) == 40


def test_landlord_needs_no_context(shared_gpu: SharedGpu) -> None:
    """A thread that never called the device has no context current."""
    failures: list[BaseException] = []

    def own() -> None:
        try:
            region = shared_gpu.physical.create(SIZE)
            os.close(region.export())
            shared_gpu.physical.used_bytes()
            region.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=own)
    thread.start()
    thread.join()
    assert failures == []
