"""A loaded drafter: its tokenizer, its backend, and what `GetDrafter` says of them.

Opened at start and at a swap, used by `pipeline`. The backend is chosen here and nowhere else.
Refuses (ModelFileError) what `modelfile` refuses, and a CUDA backend where there is none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from drafter_svc.backend import Backend
from drafter_svc.config import DrafterSettings
from drafter_svc.cpu_backend import CpuBackend
from drafter_svc.cuda_backend import CudaBackend
from drafter_svc.cuda_lists import Planter
from drafter_svc.memory_plane import MemoryPlane, Place
from drafter_svc.residency import Residency
from kernels.doctor import examine as examine_kernels
from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer
from skim.errors import Cancelled, ConfigError, SkimError


@dataclass(frozen=True)
class Drafter:
    """One model, ready to score. `close` it when no pass uses it any more.

    `why_cpu` says why its passes run on the CPU; None: they run on a GPU. `warm_up_s` is what the
    GPU's first passes took, in which kernels were made ready. `place` is that of its weights in
    the memory plane; None: they are its own.
    """

    name: str
    model_digest: str
    layout_digest: str
    tokenizer: Tokenizer
    backend: Backend
    why_cpu: str | None = None
    warm_up_s: float = 0.0
    place: Place | None = None

    @property
    def residency(self) -> Residency | None:
        """Where the weights are; None: in memory of their own, always there."""
        return None if self.place is None else self.place.residency

    def activate(self, timeout_s: float | None = None) -> None:
        """Be the one that scores: take the place in the memory plane, where there is one.

        Raises: see `Place.take`.
        """
        if self.place is not None:
            self.place.take(timeout_s)

    def idle(self) -> None:
        """No request runs or waits."""
        if self.place is not None:
            self.place.residency.idle()

    def close(self) -> None:
        """Release the weights; idempotent."""
        if self.place is not None:
            self.place.leave()
        self.backend.close()


OpenDrafter: TypeAlias = Callable[[str, Path], Drafter]


def open_drafter(
    name: str,
    path: Path,
    settings: DrafterSettings,
    *,
    planted: Planter | None = None,
    stop: threading.Event | None = None,
    plane: MemoryPlane | None = None,
) -> Drafter:
    """Read a GGUF file and make its weights and kernels ready.

    Args:
        stop: set by anybody to abandon it while a GPU's kernels are made ready.
        planted: see `cuda_backend.CudaBackend`; benchmarks only.
        plane: gives a GPU's weights their memory, once they are activated; None: it is their own.
    Raises:
        ModelFileError: the file is unreadable, corrupt or not supported.
        ConfigError: the configured backend is not there.
        Busy: the configured backend is CUDA's and the weights do not fit its free memory.
        Cancelled: `stop` was set.
    """
    with GgufFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
        digests = file.model_digest, file.layout_digest
    opened = open_backend(path, settings, planted=planted, stop=stop, plane=plane, name=name)
    backend, why_cpu, warm_up_s, place = opened
    return Drafter(name, *digests, tokenizer, backend, why_cpu, warm_up_s, place)


class Opened(NamedTuple):
    """A backend with what `Drafter` says of it."""

    backend: Backend
    why_cpu: str | None
    warm_up_s: float = 0.0
    place: Place | None = None


def open_backend(
    path: Path,
    settings: DrafterSettings,
    *,
    planted: Planter | None = None,
    stop: threading.Event | None = None,
    plane: MemoryPlane | None = None,
    name: str = "",
) -> Opened:
    """Load the weights where the settings say, and make a GPU's kernels ready.

    Raises: see `open_drafter`.
    """
    reason = None if plane is not None else check_backend(settings)
    if reason is None:
        try:
            if plane is not None:
                backend, place = plane.open(name, path)
                return Opened(backend, None, place=place)
            return _open_on_gpu(path, planted, stop)
        except Cancelled:
            raise
        except SkimError as error:  # a broken file, too: the CPU backend then says so again
            if settings.backend == "cuda":
                raise
            reason = error.message
    on_cpu = CpuBackend.open(
        path,
        num_threads=settings.threads or None,
        workspace_bytes=settings.workspace_bytes,
    )
    return Opened(on_cpu, reason)


def _open_on_gpu(path: Path, planted: Planter | None, stop: threading.Event | None) -> Opened:
    backend = CudaBackend.open(path, planted=planted)
    with ExitStack() as failed:
        failed.callback(backend.close)
        warm_up_s = backend.warm_up(stop)
        failed.pop_all()
    return Opened(backend, None, warm_up_s)


def check_backend(settings: DrafterSettings) -> str | None:
    """Say why passes run on the CPU, or None: the GPU is used.

    Raises:
        ConfigError: the settings ask for CUDA and it cannot be used.
    """
    if settings.backend == "cpu":
        return "the settings ask for it"
    reason = why_no_gpu()
    if reason is not None and settings.backend == "cuda":
        raise ConfigError(
            f"the CUDA backend cannot be used: {reason}", got="cuda", allowed="auto, cpu"
        )
    return reason


def why_no_gpu() -> str | None:
    """Ask the kernels' doctor why no pass can run on a GPU here; None: one can."""
    report = examine_kernels()
    if report["backend"] == "cuda":
        return None
    return str(report["reason"])
