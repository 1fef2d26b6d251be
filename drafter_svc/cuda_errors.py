"""The one place where what the kernels raise becomes what the service raises.

OutOfMemory              Busy, GPU_MEMORY_EXHAUSTED: another process may give memory back
every other KernelError  EngineFault, with the kernel's name in its message
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kernels.errors import KernelError, NoDevice, OutOfMemory
from skim.errors import Busy, ConfigError, EngineFault


@contextmanager
def kernel_errors(doing: str) -> Iterator[None]:
    """Map what the kernels raise.

    Args:
        doing: what was being done, for the message: `scoring 131,072 tokens`.

    Raises:
        Busy: the GPU has too little free memory for it.
        ConfigError: there is no GPU that can be used.
        EngineFault: a kernel could not be compiled or launched, or failed.
    """
    try:
        yield
    except OutOfMemory as error:
        raise Busy(
            f"the GPU has too little free memory for {doing}: {error}",
            reason="GPU_MEMORY_EXHAUSTED",
        ) from error
    except NoDevice as error:
        raise ConfigError(
            f"the CUDA backend cannot be used: {error}", got="cuda", allowed="auto, cpu"
        ) from error
    except KernelError as error:
        raise EngineFault(f"{doing} on the GPU failed: {error}", reason="GPU_FAULT") from error
