"""The asyncio side of the engine: starts the child, speaks frames with it, supervises it.

Used by the target's service; the child is `python -m target_svc.llama`. Requests become streams
(`engine_stream.py`). A child that dies fails its own requests with Unavailable and is restarted
with backoff; a model that cannot be opened is final, not a loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from skim.errors import EngineFault, InvalidRequest, PreconditionFailed, SkimError, Unavailable
from skim.log import get_logger
from target_svc.engine_stream import EngineStream, error_from
from target_svc.frames import FrameError, FrameHead, decode_body, decode_head, encode
from target_svc.messages import (
    Cancel,
    Done,
    EngineConfig,
    Failed,
    KvType,
    Load,
    Message,
    Open,
    Progress,
    Ready,
    Release,
    Released,
    Reserve,
    Reserved,
    ReserveFailed,
    StartFailed,
    Submit,
    Tokens,
)

log = get_logger()

MAX_STARTS = 3  # deaths in a row before Ready that make the failure final
STEADY_S = 10.0  # a child that lived this long after Ready resets the backoff
CLOSE_GRACE_S = 5.0  # the engine leaves at once, or after the GPU chunk that it is in
SOCKET_BYTES = 1 << 20  # the engine never waits for a service that is busy for a moment
IDLE = Load(0, 0, 0, 0, 0, 0, 0.0, 0.0)


class EngineClient:
    """Owns one engine child and everything that is said to it. Call from one event loop only."""

    def __init__(
        self, config: EngineConfig, *, backoff_s: tuple[float, float] = (0.1, 5.0)
    ) -> None:
        self._config = config
        self._backoff_s = backoff_s
        self._streams: dict[str, EngineStream] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._reservation: asyncio.Future[Reserved] | None = None
        self._release: asyncio.Future[None] | None = None
        self._changed = asyncio.Event()  # facts or failure changed
        self._closing = False
        # Called when `facts` or `failure` changed: the service's health follows the engine's.
        self.on_change: Callable[[], None] = lambda: None
        # Called with each Load, and with none at all when the child is gone.
        self.on_load: Callable[[Load], None] = lambda load: None
        self.facts: Ready | None = None
        self.failure: SkimError | None = None
        self.load: Load = IDLE
        self.full: Reserved | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the living child."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the child and its supervision; returns at once, `ready` waits.

        Raises:
            EngineFault: not called from the main thread: the child is killed when the thread that
                started it ends, and only the main thread ends with its process.
        """
        if threading.current_thread() is not threading.main_thread():
            raise EngineFault("the engine must be started from the main thread")
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def ready(self) -> Ready:
        """Wait until the model is loaded and warm.

        Raises:
            ModelFileError: the file is cut short, corrupt or of an unknown architecture.
            EngineFault: the child died again and again before it was ready, or is closed.
        """
        while True:
            if self.failure is not None:
                raise self.failure
            if self.facts is not None:
                return self.facts
            self._changed.clear()
            await self._changed.wait()

    async def submit(self, submit: Submit) -> EngineStream:
        """Send one request and return its events.

        Raises:
            Unavailable: the engine is starting or restarting; `retry_after_s` is set.
            InvalidRequest: the request id is in use.
            ModelFileError, EngineFault: the engine failed for good.
        """
        writer = self._require_writer()
        if submit.request_id in self._streams:
            raise InvalidRequest("request id is in use", got=submit.request_id)
        frame = encode(submit)
        stream = self._streams[submit.request_id] = EngineStream(submit.request_id, self.cancel)
        writer.write(frame)
        try:
            await writer.drain()
        except ConnectionError:  # the supervisor fails the stream, with the reason
            pass
        except asyncio.CancelledError:
            self.cancel(submit.request_id)
            raise
        return stream

    def cancel(self, request_id: str) -> None:
        """Stop a request; unknown and finished ones are ignored."""
        if request_id in self._streams and self._writer is not None:
            self._writer.write(encode(Cancel(request_id)))

    async def reserve(self, cells: int, kv_type: KvType) -> Reserved:
        """Create the one full context of `cells` KV cells, warmed up.

        Raises:
            PreconditionFailed: one exists already, or is being made.
            Busy: there is no memory for it.
            Unavailable: the engine is away, or died meanwhile.
        """
        while self._release is not None:  # of a reservation that was given up or is being freed
            await asyncio.shield(self._release)
        writer = self._require_writer()
        if self._reservation is not None or self.full is not None:
            raise PreconditionFailed("a full context exists already", reason="FULL_RESERVED")
        self._reservation = asyncio.get_running_loop().create_future()
        writer.write(encode(Reserve(cells, kv_type)))
        try:
            return await asyncio.shield(self._reservation)
        except asyncio.CancelledError:
            self._send_release()  # or the context would outlive whoever wanted it
            raise

    async def release(self) -> None:
        """Free the full context and wait until its memory is back. No effect when there is none."""
        if self.full is not None or self._reservation is not None:
            self._send_release()
        if self._release is not None:
            await asyncio.shield(self._release)

    def _send_release(self) -> None:
        if self._release is None and self._writer is not None:
            self._release = asyncio.get_running_loop().create_future()
            self._writer.write(encode(Release()))

    async def close(self) -> None:
        """Fail what runs, end the child, wait for it. Idempotent."""
        self._closing = True
        self._disconnect()
        if self._supervisor is not None:
            await self._supervisor
        self._set_failure(Unavailable("the engine is closed", reason="DRAINING"))

    def _require_writer(self) -> asyncio.StreamWriter:
        if self.failure is not None:
            raise self.failure
        if self._writer is None or self.facts is None:
            raise Unavailable("the engine is starting", reason="ENGINE_STARTING", retry_after_s=1.0)
        return self._writer

    async def _supervise(self) -> None:
        wait_s, deaths = self._backoff_s[0], 0
        while not self._closing:
            started_s = time.monotonic()
            failure = await self._run_child()
            was_ready = self.facts is not None
            self._forget_child()
            if self._closing:
                return
            deaths = 0 if was_ready else deaths + 1
            if failure is not None or deaths >= MAX_STARTS:
                self._set_failure(
                    failure or EngineFault(f"the engine died {deaths} times before it was ready")
                )
                return
            if was_ready and time.monotonic() - started_s > STEADY_S:
                wait_s = self._backoff_s[0]
            self.restarts += 1
            log.warning("engine_restart", backoff_s=wait_s, restarts=self.restarts)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, self._backoff_s[1])

    async def _run_child(self) -> SkimError | None:
        """One child's life; returns the error that makes another start useless."""
        ours, theirs = socket.socketpair()
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            self._process = await _spawn(theirs.fileno())
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        failure: SkimError | None = None
        try:
            if not self._closing:
                self._writer.write(encode(Open(self._config)))
                failure = await self._read(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the child is gone, or we closed the socket
        except FrameError as error:
            log.error("engine_frame_invalid", error=str(error))
            self._process.kill()
        finally:
            self._disconnect()
            code = await _reap(self._process)
            log.info("engine_exit", pid=self._process.pid, code=code)
        return failure

    async def _read(self, reader: asyncio.StreamReader) -> SkimError | None:
        while True:
            head = decode_head(await reader.readexactly(FrameHead.SIZE))
            message = decode_body(head, await reader.readexactly(head.body_bytes))
            if isinstance(message, StartFailed):
                return error_from(message.error, message.reason, message.message)
            self._dispatch(message)

    def _dispatch(self, message: Message) -> None:
        match message:
            case Progress() | Tokens():
                if stream := self._streams.get(message.request_id):
                    stream.push(message)
            case Done():
                if stream := self._streams.pop(message.request_id, None):
                    stream.push(message)
            case Failed():
                if stream := self._streams.pop(message.request_id, None):
                    stream.fail(error_from(message.error, message.reason, message.message))
            case Load():
                self.load = message
                self.on_load(message)
            case Ready():
                self.facts = message
                self._changed.set()
                self.on_change()
            case Reserved():
                self.full = message
                self._settle(message)
            case ReserveFailed():
                self._settle(error_from(message.error, message.reason, message.message))
            case Released():
                self.full = None
                if self._release is not None:
                    self._release.set_result(None)
                    self._release = None
            case _:
                raise FrameError("the engine sent a frame meant for it", got=type(message).__name__)

    def _settle(self, outcome: Reserved | SkimError) -> None:
        future, self._reservation = self._reservation, None
        if future is None or future.done():
            return
        if isinstance(outcome, Reserved):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
            future.exception()  # seen, even when the one who asked has left

    def _forget_child(self) -> None:
        """Fail everything the dead child was doing."""
        gone = Unavailable(
            "the engine stopped; it is being restarted",
            reason="ENGINE_RESTARTED",
            retry_after_s=1.0,
        )
        for stream in self._streams.values():
            stream.fail(gone)
        self._streams.clear()
        self._settle(gone)
        if self._release is not None:
            self._release.set_result(None)  # a dead child holds no memory
            self._release = None
        self._process, self.facts, self.full, self.load = None, None, None, IDLE
        self.on_load(IDLE)
        self.on_change()

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _set_failure(self, error: SkimError) -> None:
        if self.failure is None:
            self.failure = error
        self._changed.set()
        self.on_change()


async def _spawn(fd: int) -> asyncio.subprocess.Process:
    """Start the child on its end of the socketpair: a new program, never a copy of this process."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GGML_NO_BACKTRACE": "1"}
    command = ("-m", "target_svc.llama", "--fd", str(fd), "--parent-pid", str(os.getpid()))
    return await asyncio.create_subprocess_exec(
        sys.executable, *command, pass_fds=(fd,), env=environment, stdin=asyncio.subprocess.DEVNULL
    )


async def _reap(process: asyncio.subprocess.Process) -> int:
    """Wait for a child whose socket is closed; kill it when it stays."""
    try:
        return await asyncio.wait_for(process.wait(), CLOSE_GRACE_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()
