"""Run a module as `python -m MODULE` would, in a process that cannot outlive its supervisor.

`python -m skim.cli.launch PARENT_PID MODULE [ARGUMENT…]`, used by the local stack only. The kernel
kills this process when the thread that started it ends (Linux), whatever ends it. Done here, after
the interpreter's start, since code between fork and exec is unsafe in a process that has threads.
Refuses to start for a parent that is gone already.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent's thread ends; exit if it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        sys.exit("the supervisor is gone")


def main() -> None:
    """Read the command line, tie the process to its parent, become the module."""
    parent_pid, module, *arguments = sys.argv[1:]
    die_with(int(parent_pid))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
