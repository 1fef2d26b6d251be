"""The other processes of `bench.park`: a drafter-like tenant, and an observer who takes no part.

    python -m bench.park_peers tenant SOCKET MODEL
    python -m bench.park_peers observer SOCKET

The tenant is the product's own lease, residency and region, on weights of a real shape but of drawn
bytes, so no model file is written. It passes nothing; it holds the weights as a pass does and notes
when each layer arrived. The observer counts the GPU's used bytes with NVML, without a context.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu_options import open_cuda
from bench.park_models import shape_of
from bench.peer import Server
from drafter_svc.cuda_weights import CudaWeights
from drafter_svc.lease import Lease
from drafter_svc.region import LeasedRegion
from drafter_svc.residency import Residency
from kernels.device import Device, Mark, Memory
from kernels.ipc.physical import Physical, open_physical
from skim.log import configure

FILL_BYTES = 16 << 20
SAMPLE_BYTES = 4_096
WORKSPACE_PIECES = 8


class NotedMark:
    """A mark that notes when the host saw it reached."""

    def __init__(self, mark: Mark, note: Callable[[], None]) -> None:
        self.mark, self._note = mark, note

    def wait(self) -> None:
        self.mark.wait()
        self._note()

    def seconds_since(self, earlier: Mark) -> float:
        return self.mark.seconds_since(earlier)


class DrawnRegion(LeasedRegion):
    """A region of drawn weights that notes when the last park and unpark reached what.

    Attributes:
        unmapped_s, mapped_s: the moments.
        arrived_s: of each layer of the last unpark.
    """

    def __init__(self, device: Device, name: str) -> None:
        self.unmapped_s = self.mapped_s = 0.0
        self.arrived_s: list[float] = []
        super().__init__(device, Path(name), f"drawn {name}", CudaWeights(shape_of(name), 0))

    def _read_file(self) -> None:
        drawn = np.random.default_rng(0).integers(0, 256, FILL_BYTES, dtype=np.uint8)
        for piece, begin in enumerate(range(0, self.size_bytes, FILL_BYTES)):
            size = min(FILL_BYTES, self.size_bytes - begin)
            self._device.upload(self._window.address + begin, drawn[:size] + np.uint8(piece % 256))
        self._device.synchronize()

    def map(self, fd: int) -> None:
        super().map(fd)
        self.mapped_s = time.monotonic()

    def unmap(self) -> None:
        super().unmap()
        self.unmapped_s = time.monotonic()

    def copy_in(self) -> tuple[Mark, ...]:
        self.arrived_s = []
        marks = super().copy_in()
        return tuple(NotedMark(m, lambda: self.arrived_s.append(time.monotonic())) for m in marks)

    def same_as_image(self) -> bool:
        """Whether begin and end of each layer are the image's, on the device."""
        assert self._image is not None
        found = np.empty(SAMPLE_BYTES, np.uint8)
        for end in self.ends:
            for begin in (end - SAMPLE_BYTES, max(0, end - self.ends[0])):
                self._device.download(self._window.address + begin, found)
                if not np.array_equal(found, self._image.bytes_[begin : begin + SAMPLE_BYTES]):
                    return False
        return True

    def copy_rates(self, times: int) -> list[float]:
        """GB/s of copies of the whole image into the resident region: the ceiling of an unpark."""
        assert self._pinned is not None
        rates = []
        for _ in range(times):
            begin = self._device.copy_in(self._window.address, self._pinned, 0, 256)
            begin.wait()
            end = self._device.copy_in(self._window.address, self._pinned, 0, self.size_bytes)
            rates.append(self.size_bytes / end.seconds_since(begin) / 1e9)
        return rates


class Tenant:
    """What `bench.park` calls in the tenant's process."""

    def __init__(self, socket: Path, model: str, device: Device) -> None:
        self._device = device
        self.region = DrawnRegion(device, model)
        self.lease = Lease(socket)
        self.residency = Residency(model, device.uuid, self.region, self.lease.send)
        self.residency.on_release = self._release
        self._workspace: list[Memory] = []

    def attach(self) -> dict[str, Any]:
        """Register, and fill the region; seconds and sizes."""
        begin_s = time.monotonic()
        self.lease.register(self.residency, 120.0)
        return {
            "attach_s": time.monotonic() - begin_s,
            "size_bytes": self.region.size_bytes,
            "layers": len(self.region.ends),
            "first_layer_bytes": self.region.ends[0],
        }

    def hold(self, check: bool) -> dict[str, Any]:
        """Hold the weights as a pass does: moments of the last cycle, and whether all is right."""
        with self.residency.hold(threading.Event(), lambda: None) as arrivals:
            for mark in arrivals:
                mark.wait()
            return {
                "unmapped_s": self.region.unmapped_s,
                "mapped_s": self.region.mapped_s,
                "first_s": self.region.arrived_s[0],
                "last_s": self.region.arrived_s[len(self.region.ends) - 1],
                "same": self.region.same_as_image() if check else True,
            }

    def ceiling(self, times: int) -> float:
        """Median GB/s of a plain pinned copy, resident."""
        with self.residency.hold(threading.Event(), lambda: None):
            return statistics.median(self.region.copy_rates(times))

    def work(self, num_bytes: int) -> None:
        """Take a workspace that the next park gives back."""
        piece = num_bytes // WORKSPACE_PIECES
        self._workspace = [self._device.allocate(piece) for _ in range(WORKSPACE_PIECES)]

    def fds(self) -> int:
        """Open descriptors of this process."""
        return len(os.listdir("/proc/self/fd"))

    def _release(self) -> int:
        held = sum(memory.num_bytes for memory in self._workspace)
        for memory in self._workspace:
            memory.close()
        self._workspace = []
        return held

    def close(self) -> None:
        """End the lease and close the device."""
        self.lease.close()
        self.residency.close()
        self._device.close()


def main(
    open_device: Callable[[], Device] = open_cuda,
    open_observed: Callable[[Path], Physical] = lambda folder: open_physical(),
) -> int:
    """Serve calls until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.park_peers", description=__doc__)
    parser.add_argument("role", choices=("tenant", "observer"))
    parser.add_argument("socket", type=Path, help="the landlord's")
    parser.add_argument("model", nargs="?", help="of a tenant: a name of bench.park_models")
    options = parser.parse_args()
    configure("bench", "warning")
    server = Server()
    if options.role == "observer":
        server.serve({"used_bytes": open_observed(options.socket.parent).used_bytes})
        return 0
    tenant = Tenant(options.socket, options.model, open_device())
    calls = (tenant.attach, tenant.hold, tenant.ceiling, tenant.work, tenant.fds)
    server.serve({call.__name__: call for call in calls})
    tenant.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
