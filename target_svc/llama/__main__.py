"""The engine child: `python -m target_svc.llama --fd N --parent-pid P`, started by EngineClient.

Serves one socket until its other end closes, and dies with its parent whatever happens: the kernel
kills it, since a GPU's memory must not stay with an orphan. Not a program for people.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import sys

from skim.errors import EngineFault, SkimError
from skim.log import configure, get_logger
from target_svc.llama.engine import Engine
from target_svc.llama.inbox import Inbox
from target_svc.llama.library import Library
from target_svc.messages import Open, StartFailed

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with(parent_pid: int) -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise EngineFault(f"prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:  # it died before the line above
        raise EngineFault("the parent is gone", got=os.getppid(), allowed=parent_pid)


def serve(connection: socket.socket) -> int:
    """Open the model that the first message names, and serve; gives the exit status."""
    inbox = Inbox(connection)
    first = next(iter(inbox.take(wait=True)), None)
    if not isinstance(first, Open):
        return 1
    try:
        engine = Engine(Library(), first.config, inbox)
    except SkimError as error:
        get_logger().error("engine_start_failed", reason=error.reason, error=error.message)
        inbox.send(StartFailed(type(error).__name__, error.reason, error.message))
        return 1
    try:
        engine.run()
    finally:
        engine.close()
    return 0


def main() -> int:
    """Parse the command line, set the process up, serve."""
    parser = argparse.ArgumentParser(prog="target_svc.llama", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="this end of the socketpair")
    parser.add_argument("--parent-pid", type=int, required=True, help="process to die with")
    options = parser.parse_args()
    configure("engine")
    die_with(options.parent_pid)
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=options.fd) as connection:
        return serve(connection)


if __name__ == "__main__":
    sys.exit(main())
