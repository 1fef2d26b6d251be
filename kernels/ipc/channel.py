"""Frames of a lease over a unix stream socket, file descriptors included: blocking and asyncio.

A frame is a little-endian uint32 length and so many bytes of JSON (`messages.py`); its descriptors
travel by SCM_RIGHTS with its first bytes. The tenant uses `Channel` from a thread, the landlord
`AsyncChannel` in its event loop. Both read exactly one frame and never into the next, so that
descriptors cannot be taken for another frame's.

A descriptor keeps a region's memory alive wherever it lies, so none is ever left behind: what is
sent is closed at once, sent or not, and what came with a refused frame is closed with it.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence

from kernels.errors import PeerGone, ProtocolError
from kernels.ipc.messages import MAX_FRAME_BYTES, Message, decode, encode, fd_count

MAX_FDS = 2  # region and image
SEND_TIMEOUT_S = 5.0  # a peer that takes no byte for so long is gone
# A peer that lets so much pile up does not read: it is gone too. Room for one full tensor table.
MAX_UNSENT_BYTES = 2 * MAX_FRAME_BYTES

_LENGTH = struct.Struct("<I")
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * _FD_BYTES)

Received = tuple[Message, list[int]]


def close_fds(fds: Sequence[int]) -> None:
    """Close file descriptors, whatever closing one of them says."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


class _Inbox:
    """The frame that is arriving, and its descriptors."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._begin()

    def _begin(self) -> None:
        self._need = _LENGTH.size
        self._in_head = True
        self._data = bytearray()

    def step(self, sock: socket.socket) -> Received | None:
        """Read what is there of one frame, without waiting; None: more has to arrive.

        Raises:
            BlockingIOError: nothing is there.
            PeerGone: the stream ended.
            ProtocolError: the frame is refused; all its descriptors are closed.
        """
        try:
            return self._step(sock)
        except (PeerGone, ProtocolError):
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors of a frame that will not be finished."""
        close_fds(self._fds)
        self._fds = []

    def _step(self, sock: socket.socket) -> Received | None:
        begun = not self._in_head or bool(self._data)
        self._read(sock, begun)
        if len(self._data) < self._need:
            return None
        if self._in_head:
            (self._need,) = _LENGTH.unpack(self._data)
            if not 0 < self._need <= MAX_FRAME_BYTES:
                raise _error(f"a frame must have 1 to {MAX_FRAME_BYTES} bytes, got {self._need}")
            self._in_head, self._data = False, bytearray()
            return None
        message = decode(bytes(self._data))
        if len(self._fds) != fd_count(message):
            raise _error(
                f"{type(message).__name__.upper()} must come with {fd_count(message)} file "
                f"descriptors, got {len(self._fds)}"
            )
        fds, self._fds = self._fds, []
        self._begin()
        return message, fds

    def _read(self, sock: socket.socket, begun: bool) -> None:
        want = self._need - len(self._data)
        try:
            data, ancillary, flags, _ = sock.recvmsg(
                want, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            raise
        except OSError as error:
            raise PeerGone("lease", f"the connection broke: {error.strerror}") from None
        came = _descriptors(ancillary)
        self._fds += came
        if not data:
            raise PeerGone("lease", "the peer closed the connection")
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise _error(f"a frame may carry at most {MAX_FDS} file descriptors")
        if came and begun:
            raise _error("file descriptors must come with the first bytes of a frame")
        self._data += data


class Channel:
    """One end of a lease, for threads: one thread receives, any may send or close.

    Args:
        sock: a connected unix stream socket; owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._inbox = _Inbox()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket, for `select`; -1 once closed."""
        return self._sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message and close `fds`, in every case.

        Raises:
            PeerGone: the other end is gone, or takes nothing; the channel is of no more use.
        """
        try:
            with self._sending:
                self._send(_frame(message), fds)
        except OSError as error:
            raise PeerGone("lease", f"the connection broke: {error.strerror}") from None
        finally:
            close_fds(fds)

    def _send(self, rest: bytes, fds: Sequence[int]) -> None:
        until_s = time.monotonic() + SEND_TIMEOUT_S
        while rest:
            try:
                sent = _send_some(self._sock, rest, fds)
            except BlockingIOError:
                if not self._wait(select.POLLOUT, until_s):
                    self.shutdown()  # half a frame is sent: nothing can follow it
                    raise PeerGone("lease", "the peer takes nothing any more") from None
            else:
                rest, fds = rest[sent:], ()

    def receive(self, timeout_s: float | None = None) -> Received:
        """Wait for one message; its descriptors are the caller's to close.

        Raises:
            TimeoutError: none came whole in time; what came of one is kept for the next call.
            PeerGone: the other end closed the connection or died.
            ProtocolError: a frame is not one of the protocol; nothing of it is kept.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                received = self._inbox.step(self._sock)
            except BlockingIOError:
                if not self._wait(select.POLLIN, until_s):
                    raise TimeoutError(f"no message within {timeout_s} s") from None
            else:
                if received is not None:
                    return received

    def shutdown(self) -> None:
        """End the connection from any thread; a `receive` that waits raises PeerGone."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and free the socket. Idempotent; not while another thread receives."""
        self.shutdown()
        self._sock.close()
        self._inbox.close()

    def _wait(self, event: int, until_s: float | None) -> bool:
        """Wait until the socket can be read or written, or has failed; False: too late."""
        poll = select.poll()
        try:
            poll.register(self._sock, event)
        except ValueError:
            raise PeerGone("lease", "the channel is closed") from None
        if until_s is None:
            return bool(poll.poll())
        return bool(poll.poll(max(0.0, until_s - time.monotonic()) * 1e3))


class AsyncChannel:
    """One end of a lease in an event loop. `send` never waits: what the socket does not take is
    sent as it drains.

    Args:
        sock: a connected unix stream socket; owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._inbox = _Inbox()
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._readable: asyncio.Future[None] | None = None
        self.closed = False

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message; `fds` are closed once sent, or with the channel.

        To a channel that is closed, or whose peer does not read, nothing is sent: the reader
        learns of it by PeerGone.
        """
        if self.closed:
            close_fds(fds)
            return
        waiting = bool(self._unsent)
        try:
            self._unsent.append((_frame(message), fds))
        except ProtocolError:
            close_fds(fds)
            raise
        if waiting:
            if sum(len(frame) for frame, _ in self._unsent) > MAX_UNSENT_BYTES:
                self.close()
        else:
            self._flush()

    async def receive(self) -> Received:
        """Wait for one message; its descriptors are the caller's to close.

        Raises:
            PeerGone: the other end closed the connection or died, or we closed the channel.
            ProtocolError: a frame is not one of the protocol; nothing of it is kept.
        """
        while not self.closed:
            try:
                received = self._inbox.step(self._sock)
            except BlockingIOError:
                await self._wait_readable()
            else:
                if received is not None:
                    return received
        raise PeerGone("lease", "the channel is closed")

    def close(self) -> None:
        """End the connection at once; what was not sent is closed with it. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        with contextlib.suppress(OSError):
            # Frees also what lies unread on either side, descriptors included.
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._inbox.close()
        while self._unsent:
            close_fds(self._unsent.popleft()[1])
        self._wake()

    def _flush(self) -> None:
        while self._unsent:
            frame, fds = self._unsent[0]
            try:
                sent = _send_some(self._sock, frame, fds)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self.close()
                return
            close_fds(fds)
            self._unsent[0] = frame[sent:], ()
            if sent == len(frame):
                self._unsent.popleft()
        self._loop.remove_writer(self._sock)

    async def _wait_readable(self) -> None:
        self._readable = self._loop.create_future()
        self._loop.add_reader(self._sock, self._wake)
        try:
            await self._readable
        finally:
            self._readable = None
            if not self.closed:
                self._loop.remove_reader(self._sock)

    def _wake(self) -> None:
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)


def _frame(message: Message) -> bytes:
    body = encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise _error(f"a frame may have {MAX_FRAME_BYTES} bytes, this message has {len(body)}")
    return _LENGTH.pack(len(body)) + body


def _send_some(sock: socket.socket, data: bytes, fds: Sequence[int]) -> int:
    if fds:
        return socket.send_fds(sock, [data], list(fds), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    return sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    return list(fds)


def _error(message: str) -> ProtocolError:
    return ProtocolError("lease", message)
