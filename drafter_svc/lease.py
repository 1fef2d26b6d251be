"""The drafter's end of the lease: one thread that talks with the landlord of the GPU's memory.

The lease is the open socket itself (`kernels.ipc.channel`): the landlord knows by its end that the
drafter is gone, and so does the drafter of the landlord. The thread connects, says HELLO for the
one model that is to have memory, and passes each message on to its `Residency`; when the landlord
is gone it lets that finish and unmap, and only then connects again.

Refuses nothing by itself. A landlord that refuses this drafter, a frame that is not of the protocol
and a region that cannot be mapped end the connection, are told to whoever waits, and are tried
again at a slow pace, for the operator may mend them.
"""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

from drafter_svc.cuda_errors import kernel_errors
from drafter_svc.residency import Residency
from kernels.errors import PeerGone, ProtocolError
from kernels.ipc.channel import Channel, close_fds
from kernels.ipc.messages import (
    Fill,
    FromTenant,
    Message,
    Parked,
    Quiesce,
    Ready,
    Refused,
    Region,
    State,
)
from skim.errors import ConfigError, EngineFault, SkimError
from skim.log import get_logger

log = get_logger()

# Between attempts to connect: quick at first, since a landlord that restarts is soon back.
FIRST_RETRY_S, MOST_RETRY_S = 0.05, 1.0


class Lease:
    """See the module. The thread starts with the first `register`.

    Args:
        path: the landlord's socket.
        retry_s: least and most seconds between attempts to connect.

    Attributes:
        decoding: whether the target decodes now, as far as the landlord said.
    """

    def __init__(
        self, path: Path, *, retry_s: tuple[float, float] = (FIRST_RETRY_S, MOST_RETRY_S)
    ) -> None:
        self._path, self._retry_s = path, retry_s
        self.decoding = False
        self._turn = threading.Lock()  # held while a message is handled, or models change places
        self._place: Residency | None = None
        self._channel: Channel | None = None
        self._hello_open = False  # said, not answered
        self._answered = False  # a place was given on this connection
        self._hello_at_s: float | None = None  # when to say it again
        self._unreachable = ""  # why, as far as it was logged
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def send(self, message: FromTenant) -> None:
        """Tell the landlord, from any thread; nothing happens where there is none."""
        channel = self._channel
        if channel is None:
            return
        try:
            channel.send(message)
        except PeerGone:
            return  # the thread that receives learns of it too

    def register(self, place: Residency, timeout_s: float | None = None) -> None:
        """Ask for the memory of a model in the place of the one before, whose passes have ended.

        Args:
            timeout_s: to the landlord's answer; None: as long as it takes.
        Raises:
            ConfigError: the landlord does not want this drafter, or has another GPU.
            ModelFileError, Busy, EngineFault: the region could not be filled.
            Unavailable: no answer came in time, or the lease was closed.
        """
        with self._turn:
            before, self._place = self._place, place
            if before is not None and before is not place:
                before.lose()
            if self._hello_open and self._channel is not None:
                self._channel.shutdown()  # its answer could not be told from ours
            else:
                self._say_hello()
            if not self._thread.is_alive() and not self._closing.is_set():
                self._thread.start()
        place.settle(self._closing, timeout_s)

    def withdraw(self, place: Residency) -> None:
        """Let a model's memory go if it is the one that has it; the lease ends with it."""
        with self._turn:
            if self._place is place:
                self._place = None
                place.lose()
                if self._channel is not None:
                    self._channel.shutdown()

    def close(self) -> None:
        """End the lease: passes that run finish, memory is unmapped. Idempotent."""
        self._closing.set()
        channel = self._channel
        if channel is not None:
            channel.shutdown()
        if self._thread.is_alive():
            self._thread.join()

    # ---- the thread ------------------------------------------------------------------

    def _run(self) -> None:
        first_s, most_s = self._retry_s
        wait_s = 0.0
        while not self._closing.wait(wait_s):
            channel = self._connect()
            served = channel is not None and self._serve(channel)
            wait_s = first_s if served else min(most_s, max(first_s, 2.0 * wait_s))

    def _connect(self) -> Channel | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(self._path))
        except OSError as error:
            sock.close()
            reason = error.strerror or str(error)
            if reason != self._unreachable:
                self._unreachable = reason
                log.warning("landlord_unreachable", socket=str(self._path), reason=reason)
            return None
        self._unreachable = ""
        channel = Channel(sock)
        with self._turn:
            self._channel = channel
            self._say_hello()
        if self._closing.is_set():  # `close` may have looked for the channel too early
            channel.shutdown()
        return channel

    def _serve(self, channel: Channel) -> bool:
        """Talk until the connection ends; whether it was good for anything."""
        error: SkimError | None = None
        try:
            with kernel_errors("what the landlord asked"):
                self._talk(channel)
        except SkimError as problem:
            error = problem
            log.error("lease_failed", reason=error.reason, message=error.message)
        except Exception as bug:  # the thread must live: requests wait for what it brings
            log.exception("lease_failed")
            error = EngineFault(f"the lease failed: {bug!r}")
        with self._turn:
            answered, self._answered = self._answered, False
            self._channel, self._hello_open, self._hello_at_s = None, False, None
            self.decoding = False
            if self._place is not None:
                self._place.end(error)
        channel.close()  # last, so that its end tells the landlord that all is let go
        log.info("lease_ended", answered=answered)
        return answered and error is None

    def _talk(self, channel: Channel) -> None:
        """Handle messages until the landlord is gone."""
        while True:
            wait_s = None
            if self._hello_at_s is not None:
                wait_s = max(0.0, self._hello_at_s - time.monotonic())
            try:
                message, fds = channel.receive(wait_s)
            except TimeoutError:
                with self._turn:
                    self._say_hello()
                continue
            except PeerGone:
                return
            try:
                with self._turn:
                    if self._place is not None:
                        self._handle(self._place, message, fds)
            finally:
                close_fds(fds)  # those that nobody took

    def _say_hello(self) -> None:
        self._hello_at_s = None
        if self._channel is not None and self._place is not None:
            self._hello_open = True
            self.send(self._place.hello())

    def _handle(self, place: Residency, message: Message, fds: list[int]) -> None:
        match message:
            case State():
                self.decoding = message.decoding
            case Refused():
                self._refused(place, message)
            case Region(tensors=None) | Ready() | Quiesce() if self._hello_open:
                # It crossed our HELLO and speaks of the model before.
                log.info("message_outdated", message=type(message).__name__)
            case Region() | Fill() | Parked() if place.mapped:
                log.info("message_repeated", message=type(message).__name__)
            case Region() | Fill() | Parked():
                self._hello_open, self._hello_at_s, self._answered = False, None, True
                self._give(place, message, fds)
            case Ready():
                place.ready(message.generation)
            case Quiesce():
                place.quiesce(message.generation)
            case _:
                raise ProtocolError("lease", f"a landlord does not say {type(message).__name__}")

    def _give(self, place: Residency, message: Region | Fill | Parked, fds: list[int]) -> None:
        begin_s = time.monotonic()
        match message:
            case Region():
                place.attach(message, fds)
            case Fill():
                place.fill(message.generation, fds)
            case Parked():
                place.park(message, fds)
        log.info(
            "memory_given",
            model=place.model,
            message=type(message).__name__,
            generation=message.generation,
            seconds=time.monotonic() - begin_s,
        )

    def _refused(self, place: Residency, message: Refused) -> None:
        log.warning("landlord_refused", reason=message.reason, message=message.message)
        if message.retry_after_s is None:
            raise _refusal(message)
        if self._hello_open:
            self._hello_open = False
            self._hello_at_s = time.monotonic() + message.retry_after_s
            place.delayed()
        else:
            place.no_room(message.retry_after_s)


def _refusal(message: Refused) -> SkimError:
    sentence = f"the landlord of the GPU's memory refuses this drafter: {message.message}"
    if message.reason in ("GPU_MISMATCH", "PEER_NOT_ALLOWED", "NO_ROOM"):
        return ConfigError(sentence, reason=message.reason)
    return EngineFault(sentence, reason=message.reason)
