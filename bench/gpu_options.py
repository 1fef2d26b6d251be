"""What the GPU benchmarks share: lists on the command line, the device, the commit, a table."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from kernels.device import Device

ROOT = Path(__file__).resolve().parent.parent


def integers(text: str) -> list[int]:
    """Read whole numbers between commas; the list may be empty."""
    return [int(word) for word in text.split(",") if word]


def densities(without_list: str) -> Callable[[str], list[float | None]]:
    """Read densities between commas; the word `without_list` stands for None."""

    def density_list(text: str) -> list[float | None]:
        words = [word for word in text.split(",") if word]
        return [None if word == without_list else float(word) for word in words]

    return density_list


def names(text: str, known: Collection[str]) -> list[str]:
    """Read names between commas.

    Raises:
        argparse.ArgumentTypeError: one is not known.
    """
    given = [word for word in text.split(",") if word]
    unknown = set(given) - set(known)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {sorted(unknown)}; known: {sorted(known)}")
    return given


def open_cuda() -> Device:
    """The GPU of this machine."""
    from kernels.cuda_device import CudaDevice

    return CudaDevice()


def commit() -> str:
    """The commit that is measured: `GIT_COMMIT`, for a copy without history, else the checkout's.

    Empty where there is neither.
    """
    given = os.environ.get("GIT_COMMIT")
    if given:
        return given
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def gpu_facts() -> dict[str, Any] | None:
    """Name, driver and memory of the first GPU that CUDA may see; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    try:
        import pynvml

        pynvml.nvmlInit()
        if visible.isdigit():
            device = pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        else:
            device = pynvml.nvmlDeviceGetHandleByUUID(visible)
    except Exception:  # no package, no driver, no GPU: each says so with its own error
        return None
    memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    return {
        "name": pynvml.nvmlDeviceGetName(device),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "total_bytes": int(memory.total),
        "free_bytes": int(memory.free),
    }


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells, each column as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
