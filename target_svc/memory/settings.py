"""What the landlord is told: its socket, its budget, its policy. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from target_svc.memory.policy import Rules


@dataclass(frozen=True)
class MemorySettings:
    """Settings of one landlord.

    Attributes:
        socket: unix socket that tenants connect to, in a folder the operator chose.
        rules: who is parked when.
        budget_bytes: of the device, for everybody on it; 0: all of it.
        park_timeout_s: how long a tenant may take to let go before its lease is revoked.
        peer_uids: users that may connect besides our own and root.
    """

    socket: Path
    rules: Rules = field(default_factory=Rules)
    budget_bytes: int = 0
    park_timeout_s: float = 5.0
    peer_uids: tuple[int, ...] = ()
