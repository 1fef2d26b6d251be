"""A drafter whose weights live in memory that a landlord gives and takes: its device and its lease.

One a process, made by `__main__` where the settings name a landlord's socket; `drafter` opens its
models through it, `host` moves the lease from one to the next. A model is opened without memory:
only the one that scores has a place, on the device or parked, and a swap is another HELLO on the
same lease. Refuses what `CudaBackend.open` refuses, except for room: that is the landlord's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from drafter_svc.config import DrafterSettings
from drafter_svc.cuda_backend import WARM_UP_TOKENS, CudaBackend, first_gpu
from drafter_svc.cuda_errors import kernel_errors
from drafter_svc.cuda_lists import Planter
from drafter_svc.cuda_weights import CudaWeights
from drafter_svc.lease import Lease
from drafter_svc.pacing import Pacer
from drafter_svc.region import LeasedRegion
from drafter_svc.residency import PATIENCE_S, Phase, Residency
from kernels.device import Device
from modelfile.gguf_file import GgufFile
from modelfile.hparams import ModelShape
from skim.errors import Busy, ConfigError
from skim.log import get_logger

log = get_logger()


class Place:
    """One model's place in the memory plane, taken or not.

    Attributes:
        residency: where its weights are.
    """

    def __init__(
        self, lease: Lease, residency: Residency, warm_up: Callable[[], float] | None
    ) -> None:
        self._lease, self.residency, self._warm_up = lease, residency, warm_up

    def take(self, timeout_s: float | None = None) -> None:
        """Register with the landlord in the place of the model before, whose passes have ended.

        Kernels are warmed up if the weights are on the device then and there is room for it.

        Args:
            timeout_s: to the landlord's answer; None: as long as it takes.
        Raises:
            ConfigError, ModelFileError, Busy, EngineFault, Unavailable: see `Lease.register`.
            Cancelled: the plane was closed during the warm-up.
        """
        self._lease.register(self.residency, timeout_s)
        if self._warm_up is None or self.residency.phase is not Phase.RESIDENT:
            return
        try:
            log.info("warmed_up", model=self.residency.model, warm_up_s=self._warm_up())
        except Busy as error:  # the target has the memory now: the first request warms up
            log.warning("not_warmed_up", model=self.residency.model, message=error.message)
        self._warm_up = None

    def leave(self) -> None:
        """Let the memory go; the landlord keeps the weights. Idempotent."""
        self._lease.withdraw(self.residency)


class MemoryPlane:
    """The device and the lease of this process.

    Args:
        settings: `memory_socket` is set.
        planted: see `cuda_backend.CudaBackend`; benchmarks only.
        device: closed with the plane; None: the first GPU, opened with the first model.
        warm_up_tokens: length of the pass that warms kernels up; 0: none.
        patience_s: see `residency.PATIENCE_S`.
    """

    def __init__(
        self,
        settings: DrafterSettings,
        *,
        planted: Planter | None = None,
        device: Device | None = None,
        warm_up_tokens: int = WARM_UP_TOKENS,
        patience_s: float = PATIENCE_S,
    ) -> None:
        if settings.memory_socket is None:
            raise ConfigError("memory_socket must be set", got=None, allowed="a path")
        self._planted, self._warm_up_tokens = planted, warm_up_tokens
        self._patience_s = patience_s
        self._device = device
        self._closing = threading.Event()
        self.lease = Lease(settings.memory_socket)
        self._pace_s = settings.pace_work_ms * 1e-3, settings.pace_pause_ms * 1e-3

    def open(self, name: str, path: Path) -> tuple[CudaBackend, Place]:
        """Read a model file's description and reserve addresses for its weights; no memory yet.

        Raises:
            ModelFileError: the file is unreadable, corrupt, or a model the kernels do not take.
            ConfigError: there is no usable GPU, or a package of the gpu extra is missing.
        """
        with kernel_errors(f"opening {path}"):
            with GgufFile.open(path) as file:
                weights = CudaWeights(ModelShape.from_gguf(file), 0)
                digest = file.model_digest
            if self._device is None:
                self._device = first_gpu()
            device = self._device
            region = LeasedRegion(device, path, digest, weights)
        lease = self.lease
        residency = Residency(name, device.uuid, region, lease.send, patience_s=self._patience_s)
        # A pass that is asked to leave hurries: the request that needs its memory waits.
        pacer = Pacer(
            *self._pace_s, lambda: lease.decoding and residency.phase is not Phase.LEAVING
        )
        backend = CudaBackend(
            device, weights, planted=self._planted, residency=residency, pacer=pacer
        )

        def warm_up() -> float:
            return backend.warm_up(self._closing, num_tokens=self._warm_up_tokens)

        return backend, Place(lease, residency, warm_up if self._warm_up_tokens else None)

    def end_lease(self) -> None:
        """Let the memory go for good; whoever waits for it is refused. Idempotent."""
        self._closing.set()
        self.lease.close()

    def close(self) -> None:
        """Give the device back, after `end_lease` and after the models were closed; idempotent."""
        self.end_lease()
        if self._device is not None:
            with kernel_errors("closing"):
                self._device.close()
            self._device = None
