"""A loaded drafter: its tokenizer, its backend, and what `GetDrafter` says of them.

Opened at start and at a swap, used by `pipeline`. The backend is chosen here and nowhere else.
Refuses (ModelFileError) what `modelfile` refuses, and a CUDA backend where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from drafter_svc.backend import Backend
from drafter_svc.config import DrafterSettings
from drafter_svc.cpu_backend import CpuBackend
from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer
from skim.errors import ConfigError


@dataclass(frozen=True)
class Drafter:
    """One model, ready to score. `close` it when no pass uses it any more."""

    name: str
    model_digest: str
    layout_digest: str
    tokenizer: Tokenizer
    backend: Backend

    def close(self) -> None:
        """Release the weights; idempotent."""
        self.backend.close()


OpenDrafter: TypeAlias = Callable[[str, Path], Drafter]


def open_drafter(name: str, path: Path, settings: DrafterSettings) -> Drafter:
    """Read a GGUF file and make its weights ready.

    Raises:
        ModelFileError: the file is unreadable, corrupt or not supported.
        ConfigError: the configured backend is not there.
    """
    check_backend(settings)
    with GgufFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
        digests = file.model_digest, file.layout_digest
    backend = CpuBackend.open(
        path,
        num_threads=settings.threads or None,
        workspace_bytes=settings.workspace_bytes,
    )
    return Drafter(name, *digests, tokenizer, backend)


def check_backend(settings: DrafterSettings) -> None:
    """Refuse a backend that this build does not have (ConfigError). `auto` takes the CPU's."""
    if settings.backend == "cuda":
        raise ConfigError(
            "backend must be auto or cpu: this build has no CUDA backend",
            got="cuda",
            allowed="auto, cpu",
        )
