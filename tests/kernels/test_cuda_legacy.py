"""The legacy transport's landlord on a GPU, and both transports between two processes there.

Run on a GPU with -m gpu, and on a driver without one, in a process of their own, by
`test_cuda_device_without_gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kernels.errors import HandleError, InvalidArgument, OutOfMemory
from kernels.ipc.legacy import HANDLE_BYTES, Ticket, pid_namespace
from kernels.ipc.physical import Physical, open_physical
from kernels.ipc.transports import try_transport
from kernels.ipc.trial import SIZE_BYTES, TRANSPORTS

if TYPE_CHECKING:
    from kernels.cuda_device import CudaDevice
    from kernels.ipc.physical import Transport

pytestmark = pytest.mark.gpu
SIZE = 64 << 20


@pytest.fixture
def physical() -> Iterator[Physical]:
    made = open_physical(transport="legacy_ipc")
    yield made
    made.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[CudaDevice]:
    from kernels.cuda_device import CudaDevice

    (tmp_path / "none.cu").write_text('extern "C" __global__ void none() {}')
    made = CudaDevice(cache_dir=None, sources=tmp_path)
    yield made
    made.close()


def ticket_of(physical: Physical) -> Ticket:
    """A ticket for memory that is freed right after."""
    region = physical.create(SIZE)
    fd = region.export()
    ticket = Ticket.read(fd)
    os.close(fd)
    region.close()
    return ticket


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_memory_passes_between_two_processes(transport: Transport) -> None:
    report = try_transport(transport)
    assert report["reason"] == "" and report["freed_bytes"] == SIZE_BYTES


def test_region_takes_its_bytes_and_gives_them_back(physical: Physical) -> None:
    physical.create(SIZE).close()  # the first one also loads what zeroes memory
    before = physical.used_bytes()
    region = physical.create(SIZE)
    taken = physical.used_bytes() - before
    region.close()
    region.close()
    assert taken == SIZE and physical.used_bytes() == before


def test_ticket_says_where_its_handle_opens(physical: Physical) -> None:
    ticket = ticket_of(physical)
    assert len(ticket.handle) == HANDLE_BYTES and any(ticket.handle)
    assert (ticket.size_bytes, ticket.gpu_uuid) == (SIZE, physical.uuid)
    assert ticket.pid_namespace == pid_namespace()


def test_closed_region_cannot_be_exported(physical: Physical) -> None:
    region = physical.create(SIZE)
    region.close()
    with pytest.raises(HandleError, match="is closed"):
        region.export()


def test_more_than_the_gpu_has_is_out_of_memory_and_takes_nothing(physical: Physical) -> None:
    region = physical.create(SIZE)
    before = physical.used_bytes()
    whole = physical.total_bytes // physical.granularity_bytes * physical.granularity_bytes
    with pytest.raises(OutOfMemory, match="are free"):
        physical.create(whole)
    assert physical.used_bytes() == before
    region.close()


def test_size_off_the_granularity_is_refused(physical: Physical) -> None:
    with pytest.raises(InvalidArgument, match="a positive multiple of"):
        physical.create(SIZE + 1)


def test_handle_does_not_open_in_the_process_that_made_it(
    physical: Physical, device: CudaDevice
) -> None:
    with pytest.raises(HandleError, match="the handle does not open: CUDA_ERROR_"):
        device.import_handle(ticket_of(physical).handle, SIZE)


def test_handle_of_another_length_is_refused(device: CudaDevice) -> None:
    with pytest.raises(HandleError, match="a handle has 64 bytes, got 63"):
        device.import_handle(bytes(63), SIZE)
