"""The unix socket that tenants connect to: made, guarded, taken away again.

A socket file that nobody listens on is what a killed landlord left behind, and is replaced; one
that answers belongs to a living landlord, and any other file is not ours: both are refused. Who
connects is checked by the user id that the kernel vouches for, never by what it says of itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from skim.errors import ConfigError
from skim.log import get_logger

log = get_logger()

BACKLOG = 16
PATH_MAX_BYTES = 107  # sun_path, less its closing zero
ACCEPT_PAUSE_S = 0.1  # after an accept that failed for want of descriptors
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Listener:
    """Listens on a path.

    Args:
        path: of the socket file; its folder exists.
        peer_uids: users that may connect besides our own and root.
        on_connect: called with each connection, its peer's process id, and whether it may connect.
    """

    def __init__(
        self,
        path: Path,
        peer_uids: tuple[int, ...],
        on_connect: Callable[[socket.socket, int, bool], None],
    ) -> None:
        self._path = path
        self._allowed = {0, os.getuid(), *peer_uids}
        # Other users can connect only where the file lets them; then the user id decides.
        self._mode = 0o666 if peer_uids else 0o600
        self._on_connect = on_connect
        self._socket: socket.socket | None = None
        self._inode = 0

    def start(self) -> None:
        """Bind and listen.

        Raises:
            ConfigError: the path is too long, its folder is missing or not ours to write, another
                landlord listens there, or another file has the name.
        """
        _check_path(self._path)
        _remove_stale(self._path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind(str(self._path))
            os.chmod(self._path, self._mode)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise ConfigError(
                f"memory socket {self._path}: {error.strerror}", got=str(self._path)
            ) from None
        self._inode = self._path.stat().st_ino
        self._socket = sock
        self._watch()

    def close(self) -> None:
        """Stop listening, and remove the socket file if it is still ours. Idempotent."""
        if self._socket is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _watch(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        assert self._socket is not None
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors left: the connection waits, and so do we
            log.error("memory_accept_failed", error=error.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.call_later(ACCEPT_PAUSE_S, self._watch)
            return
        pid, uid = peer_credentials(connection)
        self._on_connect(connection, pid, uid in self._allowed)


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of the other end, as the kernel knows them."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return pid, uid


def _check_path(path: Path) -> None:
    size = len(os.fsencode(path))
    if size > PATH_MAX_BYTES:
        raise ConfigError(
            f"memory socket: the path has {size} bytes, a unix socket takes {PATH_MAX_BYTES}",
            got=str(path),
            allowed=f"at most {PATH_MAX_BYTES} bytes",
        )


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"memory socket {path}: {error.strerror}", got=str(path)) from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"memory socket {path}: another file has this name", got=str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ConfigError(f"memory socket {path}: {error.strerror}", got=str(path)) from None
    raise ConfigError(f"memory socket {path}: another landlord listens there", got=str(path))
