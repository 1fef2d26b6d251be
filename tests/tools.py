"""What tests of processes need: tools outside Python, and whether a process has ended."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import socket
from pathlib import Path

import psutil
import pytest

from kernels.errors import NoDevice
from kernels.ipc.physical import open_physical

ROOT = Path(__file__).resolve().parent.parent


def require_tool(name: str) -> str:
    """Path of a program; where it is missing the test skips, or fails if the tools are required."""
    found = shutil.which(name) or shutil.which(name, path=str(ROOT / ".venv/bin"))
    if found:
        return found
    sentence = f"needs the program {name}, which is not installed"
    if os.environ.get("SKIM_REQUIRE_TOOLS") == "1":
        pytest.fail(sentence)
    pytest.skip(sentence)


def require_package(module: str, distribution: str) -> None:
    """Skip a test where a package is missing, or fail it if the tools are required."""
    sentence = f"needs {module} and the package {distribution}"
    try:
        importlib.import_module(module)
        importlib.metadata.distribution(distribution)
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        sentence = f"{sentence}: {error}"
    else:
        return
    if os.environ.get("SKIM_REQUIRE_TOOLS") == "1":
        pytest.fail(sentence)
    pytest.skip(sentence)


def require_gpu() -> None:
    """Skip a test where there is no GPU whose memory can be shared."""
    try:
        open_physical().close()
    except NoDevice as error:
        pytest.skip(f"needs a CUDA device: {error}")


def open_descriptors() -> set[tuple[str, str]]:
    """This process's file descriptors and what they are of; network sockets apart.

    gRPC opens and closes those in the background for the services that earlier tests ran. Compare
    as sets: what is left to background threads may close at any time.
    """
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed by now, as the listing's own is
            target = os.readlink(f"/proc/self/fd/{fd}")
            if not target.startswith("socket:") or _family(int(fd)) == socket.AF_UNIX:
                found.add((fd, target))
    return found


def _family(descriptor: int) -> int:
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        return copy.family


def has_ended(process: psutil.Process) -> bool:
    """Whether a process runs no more; one that its new parent has not reaped yet has ended too."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
