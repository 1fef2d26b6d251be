"""The legacy transport on a fake GPU: tickets, a window for either transport, who holds bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from kernels.device import Device
from kernels.errors import HandleError
from kernels.ipc.fake_legacy import FakeLegacyPhysical
from kernels.ipc.fake_physical import FakePhysical
from kernels.ipc.legacy import (
    HANDLE_BYTES,
    TICKET_BYTES,
    SharedWindow,
    Ticket,
    is_ticket,
    pid_namespace,
)
from kernels.ipc.physical import Physical
from tests.emulator.device import EmulatedDevice
from tests.tools import require_tool

MIB = 1 << 20
SIZE_BYTES = 2 * MIB
HERE = Ticket(b"h" * HANDLE_BYTES, SIZE_BYTES, "GPU-1", pid_namespace())


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    require_tool("g++")
    emulated = EmulatedDevice()
    yield emulated
    emulated.close()


@pytest.fixture
def window(device: Device) -> Iterator[SharedWindow]:
    made = SharedWindow(device, SIZE_BYTES)
    yield made
    made.close()


def legacy() -> FakeLegacyPhysical:
    return FakeLegacyPhysical(FakePhysical(8 * MIB))


def vmm() -> FakePhysical:
    return FakePhysical(8 * MIB)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_ticket_reads_as_it_was_issued() -> None:
    fd = HERE.issue()
    assert Ticket.read(fd) == HERE and is_ticket(fd)
    os.close(fd)


def test_issued_ticket_can_be_changed_by_nobody() -> None:
    fd = HERE.issue()
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff not json",
        b"[1, 2]",
        b"{}",
        json.dumps({**HERE.__dict__, "handle": "00" * 63}).encode(),
        json.dumps({**HERE.__dict__, "handle": "zz" * 64}).encode(),
        json.dumps({**HERE.__dict__, "handle": "00" * 64, "size_bytes": True}).encode(),
        json.dumps({**HERE.__dict__, "handle": "00" * 64, "pid_namespace": "1"}).encode(),
        json.dumps({**HERE.__dict__, "handle": "00" * 64, "more": 1}).encode(),
        b"[" * TICKET_BYTES,
    ],
)
def test_forged_ticket_is_a_handle_error_and_leaves_no_descriptor(
    window: SharedWindow, body: bytes
) -> None:
    before = open_fds()
    fd = os.memfd_create("forged")
    os.write(fd, body.ljust(TICKET_BYTES))
    assert is_ticket(fd)
    with pytest.raises(HandleError, match="^ticket: "):
        window.map(fd)
    assert open_fds() == before and not window.mapped


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"pid_namespace": 7},
            "one PID namespace only, the landlord's is 7, this process's 5: .*vmm_fd",
        ),
        ({"gpu_uuid": "GPU-2"}, "lies on GPU-2, this process runs on GPU-1: .* the same GPU"),
        ({"size_bytes": 4096}, r"of 4,096 bytes, expected 2,097,152"),
    ],
)
def test_ticket_of_another_place_is_refused_with_what_differs(
    changed: dict[str, int | str], sentence: str
) -> None:
    ticket = replace(HERE, **{"pid_namespace": 5, **changed})  # type: ignore[arg-type]
    with pytest.raises(HandleError, match=sentence):
        ticket.check(size_bytes=SIZE_BYTES, gpu_uuid="GPU-1", namespace=5)


def test_ticket_of_this_place_is_taken() -> None:
    HERE.check(size_bytes=SIZE_BYTES, gpu_uuid="GPU-1", namespace=pid_namespace())


@pytest.mark.parametrize("make", [vmm, legacy])
def test_window_takes_memory_of_either_transport(
    device: Device, window: SharedWindow, make: Callable[[], Physical]
) -> None:
    physical = make()
    region = physical.create(SIZE_BYTES)
    window.map(region.export())
    assert window.mapped and window.transport == physical.transport
    sent = np.arange(SIZE_BYTES, dtype=np.uint32).view(np.uint8)[:SIZE_BYTES]
    device.upload(window.address, sent)
    window.unmap()
    window.map(region.export())
    found = np.empty_like(sent)
    device.download(window.address, found)
    assert np.array_equal(found, sent)
    window.unmap()
    region.close()


@pytest.mark.parametrize("make", [vmm, legacy])
def test_second_map_is_refused_and_leaves_no_descriptor(
    window: SharedWindow, make: Callable[[], Physical]
) -> None:
    region = make().create(SIZE_BYTES)
    window.map(region.export())
    before = open_fds()
    with pytest.raises(HandleError):
        window.map(region.export())
    assert open_fds() == before
    window.unmap()
    region.close()


def test_memory_by_handle_may_come_to_other_addresses(window: SharedWindow) -> None:
    region = legacy().create(SIZE_BYTES)
    seen = set()
    for _ in range(3):
        window.map(region.export())
        seen.add(window.address)
        window.unmap()
    region.close()
    assert len(seen) == 3


def test_freed_allocation_keeps_its_bytes_until_the_importer_closes(window: SharedWindow) -> None:
    physical = legacy()
    region = physical.create(SIZE_BYTES)
    window.map(region.export())
    region.close()
    assert physical.used_bytes() == SIZE_BYTES
    window.unmap()
    assert physical.used_bytes() == 0


def test_unread_ticket_holds_no_memory() -> None:
    physical = legacy()
    region = physical.create(SIZE_BYTES)
    ticket = region.export()
    region.close()
    assert physical.used_bytes() == 0
    os.close(ticket)


def test_ticket_of_freed_memory_opens_nothing(window: SharedWindow) -> None:
    region = legacy().create(SIZE_BYTES)
    ticket = region.export()
    region.close()
    with pytest.raises(HandleError, match="opens nothing here"):
        window.map(ticket)
    with pytest.raises(HandleError, match="is closed"):
        region.export()


def test_region_is_no_ticket_and_a_number_that_is_not_open_is_a_handle_error() -> None:
    region = vmm().create(SIZE_BYTES)
    fd = region.export()
    assert not is_ticket(fd)
    os.close(fd)
    region.close()
    with pytest.raises(HandleError, match="is not open"):
        is_ticket(fd)
