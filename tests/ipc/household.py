"""A landlord and its tenants as real processes, for the tests that kill them."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.peer import Peer
from tests.ipc.forked import ForkedPeer

WAIT_S = 30.0
NAME = "drafter"
TOTAL_MIB = 6  # room for one region of the tiny model (4 MiB), never for two


class Household:
    """Processes that share a socket and a GPU, mostly a fake one; ends them all.

    Args:
        folder: of the socket and the memory.
        model: the tenants' model file.
        transport: of the memory.
        kind: `fake`, or `gpu`, the first one of this machine.
    """

    def __init__(
        self, folder: Path, model: Path, transport: str = "vmm_fd", kind: str = "fake"
    ) -> None:
        self.socket, self.model, self._transport = folder / "s", model, transport
        self._kind = kind
        self._peers: list[Peer] = []
        self.landlord = self.new_landlord()

    def new_landlord(self, total_mib: int = TOTAL_MIB) -> Peer:
        """Start a landlord; the one before, if any, is dead."""
        module = "tests.fixtures.landlord_process"
        peer = ForkedPeer(module, str(self.socket), str(total_mib), self._transport, self._kind)
        self._peers.append(peer)
        peer.event("ready", WAIT_S)
        self.landlord = peer
        return peer

    def new_tenant(self) -> Peer:
        """Start a tenant; it has not registered."""
        module = "tests.fixtures.tenant_process"
        peer = ForkedPeer(module, str(self.socket), str(self.model), NAME, self._kind)
        self._peers.append(peer)
        return peer

    def resident(self) -> Peer:
        """A tenant whose weights were filled from the file, or that found them."""
        tenant = self.new_tenant()
        tenant.call("take")
        self.until("RESIDENT")
        return tenant

    def until(self, state: str) -> dict[str, Any]:
        """Wait for a state of the region; what holds then."""
        found: dict[str, Any] = self.landlord.call("until", name=NAME, state=state)
        return found

    def park(self, **given: Any) -> Future[Any]:
        """Begin a park."""
        return self.landlord.start("park", name=NAME, **given)

    def unpark(self, **given: Any) -> Future[Any]:
        """Begin an unpark."""
        return self.landlord.start("unpark", name=NAME, **given)

    def used_bytes(self) -> int:
        """What anybody holds of the fake GPU."""
        used: int = self.landlord.call("used_bytes")
        return used

    def check_used(self, num_bytes: int) -> None:
        """Whether that is what anybody holds; on a real GPU contexts and other processes hold more.

        There the landlord's own count of what a park freed must do.
        """
        if self._kind == "fake":
            assert self.used_bytes() == num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for peer in self._peers:
            peer.end()
        for peer in self._peers:
            peer.close()


def freeze(peer: Peer) -> None:
    """Stop a process where it stands: it holds what it holds and answers nothing."""
    os.kill(peer.pid, signal.SIGSTOP)


def thaw(peer: Peer) -> None:
    os.kill(peer.pid, signal.SIGCONT)
