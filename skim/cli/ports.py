"""Ports of the local services: the usual six, six free ones, and which are taken.

`skim up` checks before it starts anything, so that a port in use is one clear line and no half
started system.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from skim.errors import ConfigError

# Ports of gateway, drafter, target from the base on; their admin ports ten above.
SERVICES = ("gateway", "drafter", "target")
DEFAULT_BASE_PORT = 50_051
ADMIN_OFFSET = 10
HIGHEST_BASE_PORT = 65_535 - ADMIN_OFFSET - len(SERVICES) + 1


def plan_ports(base_port: int) -> dict[str, tuple[int, int]]:
    """Data and admin port of each service; base 0 picks six that are free.

    Raises:
        ConfigError: the base leaves no room for six ports.
    """
    if base_port == 0:
        free = free_ports(2 * len(SERVICES))
        return {name: (free[2 * i], free[2 * i + 1]) for i, name in enumerate(SERVICES)}
    if not 1 <= base_port <= HIGHEST_BASE_PORT:
        raise ConfigError(
            f"port must be 0 (free ports) or 1 to {HIGHEST_BASE_PORT}, got {base_port}",
            field="port",
            got=base_port,
            allowed=f"0 to {HIGHEST_BASE_PORT}",
        )
    return {
        name: (base_port + index, base_port + ADMIN_OFFSET + index)
        for index, name in enumerate(SERVICES)
    }


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def require_free(addresses: Sequence[tuple[str, str]]) -> None:
    """Refuse addresses that somebody listens on already.

    Args:
        addresses: what each is for, and `host:port`; other forms are left to the service.
    Raises:
        ConfigError: the first one that is taken, or whose host is not of this machine.
    """
    for purpose, address in addresses:
        host, _, port = address.rpartition(":")
        if not port.isdigit() or address.startswith("unix:"):
            continue
        host = host.strip("[]")
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As the services bind: a port whose last connections are still closing counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host or "127.0.0.1", int(port)))
            except OSError as error:
                raise _taken(purpose, address, error) from None
            except OverflowError:
                raise ConfigError(
                    f"{purpose}: port must be 0 to 65535, got {port}", field=purpose, got=port
                ) from None


def _taken(purpose: str, address: str, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"cannot listen on {address} for the {purpose}: the port is in use",
            reason="ADDRESS_UNAVAILABLE",
            field=purpose,
            got=address,
            allowed="a free port",
        )
    return ConfigError(
        f"cannot listen on {address} for the {purpose}: {error.strerror or error}",
        reason="ADDRESS_UNAVAILABLE",
        field=purpose,
        got=address,
        allowed="an address of this machine",
    )
