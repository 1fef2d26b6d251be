"""Whether the local stack's target and drafters share a GPU's memory, and through which socket.

Asked once, before the first process starts, where there is a GPU driver and nobody has chosen
otherwise: a trial between two other processes (`kernels.ipc.transports`) shows whether memory
passes at all. Where it does not, each process keeps memory of its own, and one line says why.
Raises nothing: a stack without the memory plane works.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from skim.cli.stack_plan import Lookup, ServicePlan, StackOptions

CUDA_DRIVER = "libcuda.so.1"
SOCKET_NAME = "memory.sock"
PATH_MAX_BYTES = 107  # of a unix socket: sun_path, less its closing zero
TRIAL_TIMEOUT_S = 110.0  # two transports may take 50 s each; one that works takes about 3 s
KEEP_OWN = "each process keeps GPU memory of its own"

# The report of a trial: `ok`, `transport`, and `line`, a sentence for people.
Trial: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Sharing:
    """What was decided.

    Attributes:
        line: for people; empty: there is nothing to say.
        environment: for target and drafters; empty: nothing is shared.
        folder: of the socket; goes with `cleanup`, or with this process.
    """

    line: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: tempfile.TemporaryDirectory[str] | None = None

    def apply(self, plans: Sequence[ServicePlan]) -> tuple[ServicePlan, ...]:
        """The plans, with what target and drafters are told."""
        return tuple(
            plan
            if plan.name == "gateway"
            else replace(plan, environment={**plan.environment, **self.environment})
            for plan in plans
        )

    def cleanup(self) -> None:
        """Remove the socket's folder, once nobody listens there; idempotent."""
        if self.folder is not None:
            self.folder.cleanup()


def plan_sharing(
    options: StackOptions,
    *,
    has_driver: Callable[[], bool] | None = None,
    trial: Callable[[str | None], Trial] | None = None,
    parents: Sequence[str] | None = None,
) -> Sharing:
    """Decide, and make the socket's folder; only this user may enter it.

    Args:
        has_driver: whether a GPU's driver is there; tests pass their own, as for the rest.
        trial: tries a transport, or each until one works.
        parents: folders in which the socket's own may be made, the best first.
    Raises:
        ConfigError: the settings file cannot be read.
    """
    lookup = Lookup(options)
    chosen = lookup.get("target", "memory_socket") or lookup.get("drafter", "memory_socket")
    on_cpu = lookup.get("drafter", "backend") == "cpu"
    if chosen or on_cpu or not options.share_gpu or not (has_driver or has_cuda_driver)():
        return Sharing()
    found = (trial or try_transports)(lookup.get("target", "memory_transport"))
    if not found["ok"]:
        return Sharing(f"{found['line']} So {KEEP_OWN}.")
    folder = _private_folder(parents or _usual_parents())
    if folder is None:
        return Sharing(f"No folder here has a path short enough for a socket, so {KEEP_OWN}.")
    socket, transport = str(Path(folder.name) / SOCKET_NAME), str(found["transport"])
    environment = {
        "SKIM_TARGET_MEMORY_SOCKET": socket,
        "SKIM_DRAFTER_MEMORY_SOCKET": socket,
        "SKIM_TARGET_MEMORY_TRANSPORT": transport,
    }
    line = f"Target and drafters share the GPU's memory ({transport}) through {socket}"
    return Sharing(line, environment, folder)


def has_cuda_driver() -> bool:
    """Whether the CUDA driver's library is there: without it there is no GPU to share."""
    try:
        ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return False
    return True


def try_transports(transport: str | None = None, timeout_s: float = TRIAL_TIMEOUT_S) -> Trial:
    """Try a transport, or each until one works, in a child process.

    Returns:
        The report of the one that works; where none does, that of the first.
    """
    command = [sys.executable, "-m", "kernels.ipc.transports", "--first"]
    try:
        ran = subprocess.run(
            [*command, *([transport] if transport else [])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        reports: list[Trial] = [json.loads(line) for line in ran.stdout.splitlines()]
        return reports[-1] if reports[-1]["ok"] else reports[0]
    except subprocess.TimeoutExpired:
        return {"ok": False, "line": f"No transport of GPU memory answered in {timeout_s:g} s."}
    except (ValueError, IndexError):
        last = (ran.stderr.strip().splitlines() or ["it printed nothing"])[-1].rstrip(".")
        return {"ok": False, "line": f"The trial of GPU memory's transports ended early: {last}."}


def _usual_parents() -> list[str]:
    """Where sockets of this user may lie."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [*([runtime] if runtime else []), tempfile.gettempdir(), "/tmp"]


def _private_folder(parents: Sequence[str]) -> tempfile.TemporaryDirectory[str] | None:
    for parent in parents:
        try:
            made = tempfile.TemporaryDirectory(
                prefix="skim-", dir=parent, ignore_cleanup_errors=True
            )
        except OSError:  # not there, or not ours to write to
            continue
        if len(os.fsencode(Path(made.name) / SOCKET_NAME)) <= PATH_MAX_BYTES:
            return made
        made.cleanup()
    return None
