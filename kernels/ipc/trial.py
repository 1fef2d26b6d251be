"""Does a GPU's memory pass between two processes here? One trial of one transport, by two peers.

    python -m kernels.ipc.trial landlord vmm_fd /run/skim/trial.sock    # in one container
    python -m kernels.ipc.trial tenant vmm_fd /run/skim/trial.sock      # in the other

The landlord makes a region; the tenant maps it, writes it, lets it go, maps it again and must find
what it wrote; then the landlord frees it and counts the bytes. `transports.try_transport` starts
both on one machine. Each prints one JSON object. Never raises for what it finds: a failure is one
sentence in `reason`, told by both.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from kernels.device import Device
from kernels.errors import KernelError
from kernels.ipc.legacy import SharedWindow, pid_namespace
from kernels.ipc.physical import Physical, Transport, open_physical

SIZE_BYTES = 64 << 20  # large enough to stand out among what other processes take and give back
ATTEMPTS = 3  # other processes may take memory at the very moment of the count
PEER_TIMEOUT_S = 40.0  # a peer's start included: imports and a context take about 2 s
_MESSAGE_BYTES = 4_096
_RETRY_S = 0.05
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)


class _Failed(Exception):
    """Why memory does not pass, for people."""


class _Peer:
    """The other process: JSON messages over one packet socket, at most one descriptor each."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock, self._name = sock, name
        sock.settimeout(PEER_TIMEOUT_S)

    def send(self, message: dict[str, Any], fd: int | None = None) -> None:
        """Send one message; the descriptor is closed here, sent or not."""
        try:
            socket.send_fds(self._sock, [json.dumps(message).encode()], [] if fd is None else [fd])
        except OSError as error:
            raise _Failed(f"the {self._name} went away: {error.strerror}") from error
        finally:
            if fd is not None:
                os.close(fd)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Wait for one message that is not a failure."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, _MESSAGE_BYTES, 1)
        except TimeoutError as error:
            raise _Failed(f"the {self._name} did not answer in {PEER_TIMEOUT_S:g} s") from error
        except OSError as error:
            raise _Failed(f"the {self._name} went away: {error.strerror}") from error
        if not data:
            raise _Failed(f"the {self._name} ended without an answer")
        message: dict[str, Any] = json.loads(data)
        if "failed" in message:
            raise _Failed(message["failed"])
        return message, fds


def landlord(physical: Physical, path: Path) -> dict[str, Any]:
    """Make a region for the tenant that connects to `path`, and count what comes free.

    Returns:
        transport, ok, reason (empty if ok), and when it works: size_bytes, create_ms, map_ms,
        freed_bytes; gpu_uuid and pid_namespace of both, landlord first.
    """
    report: dict[str, Any] = {"transport": physical.transport, "ok": False, "reason": ""}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(PEER_TIMEOUT_S)
        listener.bind(str(path))
        listener.listen(1)
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            return {**report, "reason": f"no tenant came within {PEER_TIMEOUT_S:g} s"}
        finally:
            path.unlink(missing_ok=True)
    with sock:
        peer = _Peer(sock, "tenant")
        try:
            _share(physical, peer, report)
        except (_Failed, KernelError) as error:
            _tell(peer, error)
            return {**report, "reason": str(error)}
    return {**report, "ok": True}


def _share(physical: Physical, peer: _Peer, report: dict[str, Any]) -> None:
    hello, _ = peer.receive()
    report["gpu_uuid"] = [physical.uuid, hello["gpu_uuid"]]
    report["pid_namespace"] = [pid_namespace(), hello["pid_namespace"]]
    if hello["gpu_uuid"] != physical.uuid:
        raise _Failed(
            f"the landlord's GPU is {physical.uuid}, the tenant's {hello['gpu_uuid']}: "
            "give both processes the same GPU"
        )
    report["size_bytes"], report["freed_bytes"] = SIZE_BYTES, 0
    for _ in range(ATTEMPTS):
        if report["freed_bytes"] < SIZE_BYTES:
            _pass_once(physical, peer, report)
    peer.send({"do": "end"})
    if report["freed_bytes"] < SIZE_BYTES:
        raise _Failed(
            f"{report['freed_bytes']:,} of {SIZE_BYTES:,} bytes came free when both let go, "
            f"{ATTEMPTS} times"
        )


def _pass_once(physical: Physical, peer: _Peer, report: dict[str, Any]) -> None:
    begin_s = time.perf_counter()
    region = physical.create(SIZE_BYTES)
    try:
        report["create_ms"] = _ms_since(begin_s)
        peer.send({"do": "write"}, region.export())
        report["map_ms"] = peer.receive()[0]["map_ms"]
        peer.send({"do": "read"}, region.export())
        if not peer.receive()[0]["same"]:
            raise _Failed("the tenant found other bytes than it had written")
        before = physical.used_bytes()
        region.close()
        report["freed_bytes"] = before - physical.used_bytes()
    finally:
        region.close()


def tenant(device: Device, path: Path) -> dict[str, Any]:
    """Map, write and read what the landlord at `path` shares.

    Returns:
        ok, reason (empty if ok).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        peer = _Peer(sock, "landlord")
        try:
            _connect(sock, path)
            peer.send({"gpu_uuid": device.uuid, "pid_namespace": pid_namespace()})
            _use(device, peer)
        except (_Failed, KernelError) as error:
            _tell(peer, error)
            return {"ok": False, "reason": str(error)}
    return {"ok": True, "reason": ""}


def _connect(sock: socket.socket, path: Path) -> None:
    until_s = time.monotonic() + PEER_TIMEOUT_S
    while True:
        try:
            return sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if time.monotonic() > until_s:
                raise _Failed(f"no landlord listens at {path}: {error.strerror}") from error
            time.sleep(_RETRY_S)


def _use(device: Device, peer: _Peer) -> None:
    window = SharedWindow(device, SIZE_BYTES)
    # Different in each trial, and never zero as memory that nobody wrote.
    sent = np.random.default_rng().integers(1, 256, SIZE_BYTES, dtype=np.uint8)
    try:
        while (received := peer.receive())[0]["do"] != "end":
            message, fds = received
            begin_s = time.perf_counter()
            window.map(fds[0])
            answer: dict[str, Any] = {"map_ms": _ms_since(begin_s)}
            if message["do"] == "write":
                device.upload(window.address, sent)
                device.synchronize()
            else:
                found = np.empty_like(sent)
                device.download(window.address, found)
                answer["same"] = bool(np.array_equal(found, sent))
            window.unmap()
            peer.send(answer)
    finally:
        window.close()


def _tell(peer: _Peer, error: Exception) -> None:
    """Let the other one say the same, if it is still there."""
    try:
        peer.send({"failed": str(error)})
    except _Failed:
        return


def _ms_since(begin_s: float) -> float:
    return round((time.perf_counter() - begin_s) * 1e3, 3)


def main(
    physical_of: Callable[[Transport], Physical],
    open_device: Callable[[], Device],
    arguments: Sequence[str] | None = None,
) -> int:
    """Be one of the peers and print its report; 0 when memory passes."""
    parser = argparse.ArgumentParser(prog="python -m kernels.ipc.trial", description=__doc__)
    parser.add_argument("role", choices=("landlord", "tenant"))
    parser.add_argument("transport", choices=TRANSPORTS)
    parser.add_argument("socket", type=Path, help="path of a unix socket that both peers reach")
    given = parser.parse_args(arguments)
    try:
        if given.role == "landlord":
            report = landlord(physical_of(given.transport), given.socket)
        else:
            report = tenant(open_device(), given.socket)
    except (KernelError, ImportError, OSError) as error:
        report = {"ok": False, "crashed": True, "reason": f"the {given.role} cannot start: {error}"}
    print(json.dumps(report), flush=True)
    return 0 if report["ok"] else 1


def _open_device() -> Device:
    from kernels.cuda_device import CudaDevice

    return CudaDevice(cache_dir=None)


if __name__ == "__main__":
    sys.exit(main(lambda transport: open_physical(transport=transport), _open_device))
