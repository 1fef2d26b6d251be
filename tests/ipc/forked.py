"""Processes that start in milliseconds: forked from a server that has imported everything.

A test of this folder needs two or three of them, and a new interpreter spends seconds on imports.
What runs is the same: the module as `python -m` runs it, in a process of its own that the test can
kill. The server itself has one thread and opens no device.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import reduction
from typing import Any

from bench.peer import Peer

PRELOADED = [
    "pytest",
    "tests.fixtures.drafter_process",
    "tests.fixtures.landlord_process",
    "tests.fixtures.tenant_process",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


class ForkedPeer(Peer):
    """A `Peer` of the server."""

    def _start(self, module: str, arguments: Sequence[str]) -> Any:
        return _Forked(module, arguments)


class _Forked:
    """What `Peer` needs of `subprocess.Popen`."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        read_in, write_in = os.pipe()
        read_out, write_out = os.pipe()
        given = reduction.DupFd(read_in), reduction.DupFd(write_out)
        self._process = _CONTEXT.Process(target=_run, args=(module, list(arguments), *given))
        self._process.start()
        os.close(read_in)
        os.close(write_out)
        self.stdin, self.stdout = os.fdopen(write_in, "w"), os.fdopen(read_out)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: list[str], stdin: Any, stdout: Any) -> None:
    for given, number in ((stdin, 0), (stdout, 1)):
        fd = given.detach()
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # imported by the server; here it is the program
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        os._exit(int(end.code or 0))
