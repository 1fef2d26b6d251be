"""Which memory transports work on this machine: a trial of each between two real processes.

`python -m kernels.ipc.transports` prints a JSON line for each, or for those that it names, and with
`--first` ends at the first that works; `kernels.doctor` and the local stack ask the same where
there is a GPU. The peers (`kernels.ipc.trial`) are started as siblings in sessions of their own,
since a child of the landlord may open what no other process can; between two containers, run the
peers by hand. Refuses nothing: what fails is a sentence.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, get_args

from kernels.ipc.physical import Transport

ALL: tuple[Transport, ...] = get_args(Transport)  # the default one first
PEER = "kernels.ipc.trial"
TRIAL_TIMEOUT_S = 50.0  # two in a row fit what a doctor may take
GRACE_S = 2.0  # for the second peer, once the first has ended


def try_transports() -> list[dict[str, Any]]:
    """A report of `try_transport` for each transport, the default one first."""
    return [try_transport(transport) for transport in ALL]


def try_transport(
    transport: Transport, *, module: str = PEER, timeout_s: float = TRIAL_TIMEOUT_S
) -> dict[str, Any]:
    """Run landlord and tenant as two processes of their own sessions, neither the other's child.

    Args:
        transport: which one.
        module: what `python -m` runs with the arguments of this one; a test has its own.
        timeout_s: for both together.

    Returns:
        The landlord's report (see `landlord`), with `line`, a sentence for people.
    """
    with tempfile.TemporaryDirectory(prefix="skim-trial-") as folder:
        command = [sys.executable, "-m", module]
        rest = [transport, str(Path(folder) / "trial.sock")]
        peers = {role: _start([*command, role, *rest]) for role in ("landlord", "tenant")}
        said = _finish(peers, timeout_s)
    report = {"transport": transport, **said["landlord"]}
    # Who did not even start knows why, the other only that it waited in vain.
    first = next((it for it in said.values() if it.get("crashed")), report)
    if not report["ok"]:
        report["reason"] = first["reason"]
    return {**report, "line": sentence(report)}


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _finish(peers: dict[str, subprocess.Popen[str]], timeout_s: float) -> dict[str, dict[str, Any]]:
    """Wait for both reports; once one peer has ended, the other gets a moment more."""
    with ThreadPoolExecutor(len(peers)) as pool:
        running = {role: pool.submit(peer.communicate) for role, peer in peers.items()}
        _, late = wait(running.values(), timeout_s, FIRST_COMPLETED)
        wait(late, GRACE_S)
        hung = {role for role, future in running.items() if not future.done()}
        for role in hung:
            peers[role].kill()
        said = {role: future.result() for role, future in running.items()}
    return {
        role: {"ok": False, "reason": f"the {role} did not end and was killed"}
        if role in hung
        else _report(role, peers[role], *said[role])
        for role in peers
    }


def _report(role: str, peer: subprocess.Popen[str], out: str, err: str) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(out.splitlines()[-1])
        return report
    except (ValueError, IndexError):
        last = (err.strip().splitlines() or ["it printed nothing"])[-1]
        reason = f"the {role} ended with code {peer.returncode}: {last}"
        return {"ok": False, "crashed": True, "reason": reason}


def sentence(report: dict[str, Any]) -> str:
    """What a trial's report means, for people."""
    transport, mib = report["transport"], 1 << 20
    if not report["ok"]:
        reason = report["reason"].rstrip(".")
        return f"Memory does not pass between two processes by {transport}: {reason}."
    return (
        f"Memory passes between two processes by {transport}: {report['size_bytes'] / mib:.0f} MiB "
        f"mapped in {report['map_ms']:.1f} ms, kept while nobody had it mapped, "
        f"{report['freed_bytes'] / mib:.0f} MiB free again afterwards."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the reports; 1 when the last one is that of a transport that does not work."""
    parser = argparse.ArgumentParser(prog="python -m kernels.ipc.transports", description=__doc__)
    parser.add_argument("transports", nargs="*", metavar="TRANSPORT", help=", ".join(ALL))
    parser.add_argument("--first", action="store_true", help="end at the first that works")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.transports if name not in ALL]:
        parser.error(f"no transport is named {unknown[0]!r}; there are: {', '.join(ALL)}")
    found: dict[str, Any] = {}
    for transport in options.transports or ALL:
        found = try_transport(transport)
        print(json.dumps(found), flush=True)
        if found["ok"] and options.first:
            break
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
