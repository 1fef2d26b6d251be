"""Loads llama.cpp: environment, CUDA libraries, log filter. The only door to `llama_cpp`.

Called once, first thing in the engine child, before any model. Refuses a CUDA build whose driver or
CUDA libraries are not there, with what to install instead of the loader's bare message. What
llama.cpp logs as a warning or an error is kept, since its functions only return NULL; so are the
sizes of the buffers that it says it made, since no function tells them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import site
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

from skim.errors import ConfigError
from skim.log import get_logger

log = get_logger()

CUDA_DRIVER = "libcuda.so.1"
# cublas needs cublasLt, and both need the runtime, hence the order.
CUDA_LIBRARIES = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13")
LEVEL_WARN, LEVEL_ERROR, LEVEL_CONTINUE = 3, 4, 5  # enum ggml_log_level; no names in the binding
# One line an ubatch when positions have gaps, which is what ORIGINAL positions are.
EXPECTED = ("non-consecutive token position",)
# "sched_reserve:      CUDA0 compute buffer size =   493.00 MiB"
BUFFER = re.compile(r": +(\S+) +(\S+) buffer size = +([\d.]+) MiB")


class Library:
    """The loaded library.

    Attributes:
        api: the module of low-level bindings; untyped, every pointer in it is raw.
    """

    def __init__(self) -> None:
        # A failed GGML_ASSERT would otherwise run gdb for seconds before it aborts.
        os.environ["GGML_NO_BACKTRACE"] = "1"
        directory = _library_directory()
        if any(directory.glob("libggml-cuda.so*")):  # with or without a version, as it was built
            preload_cuda()
        try:
            self.api: Any = import_bindings()
        except (OSError, RuntimeError, ImportError) as error:  # what the dynamic loader says
            raise ConfigError(
                f"llama.cpp cannot be loaded: {error}", reason="LLAMA_CPP_BROKEN"
            ) from error
        self._said: deque[str] = deque(maxlen=8)
        self._buffers: dict[tuple[str, str], int] = {}
        self._line_level = 0
        self.log_callback = self.api.llama_log_callback(self._log)  # must outlive every call
        self.api.llama_log_set(self.log_callback, ctypes.c_void_p(0))
        self.api.llama_backend_init()

    @property
    def has_gpu(self) -> bool:
        """Whether this build can put layers on a GPU."""
        return bool(self.api.llama_supports_gpu_offload())

    def take_errors(self) -> str:
        """Give what llama.cpp complained about since the last call, and forget it."""
        said = "; ".join(self._said)
        self._said.clear()
        return said

    def take_buffers(self) -> dict[tuple[str, str], int]:
        """Give the buffers made since the last call, and forget them.

        Returns:
            Bytes by device (`CPU`, `CUDA0`, `CUDA_Host`, …) and purpose (`KV`, `RS`, `compute`,
            `output`, `model`).
        """
        made, self._buffers = self._buffers, {}
        return made

    def _log(self, level: int, text: bytes, _: Any) -> None:
        # Called from llama.cpp's own threads, and an exception here would vanish: keep it trivial.
        self._line_level = level if level != LEVEL_CONTINUE else self._line_level
        line = text.decode(errors="replace").strip()
        if found := BUFFER.search(line):
            self._buffers[found[1], found[2]] = int(float(found[3]) * (1 << 20))
        if self._line_level not in (LEVEL_WARN, LEVEL_ERROR) or not line:
            return
        if any(known in line for known in EXPECTED):
            return
        if self._line_level == LEVEL_ERROR:
            self._said.append(line)
        log.debug("llama_log", line=line)


def import_bindings() -> Any:
    """Import the low-level bindings without the package around them.

    The package's own `__init__` imports its server classes, chat formats and a template engine:
    0.7 s of every start and restart, and nothing of it is used here.
    """
    if "llama_cpp" in sys.modules:
        return importlib.import_module("llama_cpp.llama_cpp")
    package = ModuleType("llama_cpp")
    package.__path__ = [str(_package_directory())]
    sys.modules["llama_cpp"] = package
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    finally:
        del sys.modules["llama_cpp"]  # whoever wants the whole package can still import it


def preload_cuda() -> None:
    """Load what a CUDA build links: the driver, and CUDA 13's libraries by path or from wheels.

    Raises:
        ConfigError: one is missing; names it and what to install.
    """
    if not _loads(CUDA_DRIVER):
        raise ConfigError(
            f"llama.cpp was built for CUDA, but the driver's {CUDA_DRIVER} cannot be loaded: give "
            "this machine or container its GPU, or install llama-cpp-python's CPU build",
            reason="CUDA_LIBRARY_MISSING",
            got=CUDA_DRIVER,
        )
    # Wheels lie beside each other in any folder that Python imports from, PYTHONPATH's among them.
    roots = dict.fromkeys((*sys.path, *site.getsitepackages(), site.getusersitepackages()))
    for name in CUDA_LIBRARIES:
        wheels = (str(Path(root) / "nvidia" / "cu13" / "lib" / name) for root in roots)
        if not any(_loads(candidate) for candidate in (name, *wheels)):
            raise ConfigError(
                f"llama.cpp was built for CUDA, but {name} cannot be loaded: install the CUDA 13 "
                "runtime (pip: nvidia-cuda-runtime, nvidia-cublas) or set LD_LIBRARY_PATH",
                reason="CUDA_LIBRARY_MISSING",
                got=name,
            )


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _library_directory() -> Path:
    if override := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(override)
    return _package_directory() / "lib"


def _package_directory() -> Path:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise ConfigError(
            f"llama-cpp-python is not installed for {sys.executable}", reason="LLAMA_CPP_MISSING"
        )
    return Path(found.origin).parent
