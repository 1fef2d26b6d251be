"""The engine's end of the socket: a thread that reads frames, and the way to send them.

The thread notes cancellations the moment they arrive, since the engine's own thread may be inside
a decode for seconds and asks `cancelled` from llama.cpp's abort callback. When the service is gone
(end of stream) or sends something that is no frame, the inbox closes and the engine leaves.
"""

from __future__ import annotations

import queue
import socket
import threading
from typing import get_args

from skim.log import get_logger
from target_svc.frames import FrameError, FrameHead, decode_body, decode_head, encode
from target_svc.messages import Cancel, FromEngine, Message, ToEngine

log = get_logger()


class Inbox:
    """Reads `ToEngine` messages from a socket and writes `FromEngine` ones to it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self.closed = False
        self._thread = threading.Thread(target=self._read, name="engine-inbox", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool) -> list[Message]:
        """Give what arrived, in order; with `wait`, at least one unless the inbox closes."""
        taken: list[Message] = []
        while not self.closed:
            try:
                message = self._messages.get(block=wait and not taken)
            except queue.Empty:
                break
            if message is not None:  # None only wakes a waiting engine
                taken.append(message)
        return taken

    def cancelled(self, request_id: str) -> bool:
        """Tell whether a Cancel came for a request, even if the engine has not taken it yet."""
        return request_id in self._cancelled

    def forget(self, request_id: str) -> None:
        """Drop what is known about a request that ended."""
        self._cancelled.discard(request_id)

    def send(self, message: FromEngine) -> None:
        """Write one message; closes the inbox when nobody reads any more."""
        try:
            self._connection.sendall(encode(message))
        except OSError:
            self.closed = True

    def _read(self) -> None:
        try:
            while True:
                head = decode_head(self._exactly(FrameHead.SIZE))
                message = decode_body(head, self._exactly(head.body_bytes))
                if not isinstance(message, get_args(ToEngine)):
                    raise FrameError("the service sent a frame meant for it")
                if isinstance(message, Cancel):
                    self._cancelled.add(message.request_id)
                self._messages.put(message)
        except (EOFError, OSError):
            pass  # the service closed its end, or died
        except FrameError as error:
            log.error("engine_frame_invalid", error=str(error))
        self.closed = True
        self._messages.put(None)

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        view, filled = memoryview(data), 0
        while filled < count:
            received = self._connection.recv_into(view[filled:])
            if not received:
                raise EOFError
            filled += received
        return bytes(data)
