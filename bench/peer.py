"""Another process of a measurement or a test, called by name: JSON lines on its standard streams.

`Peer` starts `python -m MODULE` and calls what that module hands to `serve`. Calls run beside each
other, each in a thread of its own; the other side may also tell events. The other process ends when
its standard input does, or by `kill`. What it logs goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

CALL_TIMEOUT_S = 60.0


class PeerError(Exception):
    """The call failed there, or the process is gone."""


class Peer:
    """A process that serves calls; a context manager.

    Args:
        module: what `python -m` runs.
        arguments: of its command line.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = self._start(module, arguments)
        self.pid = self._process.pid
        self._name = module
        self._calls: dict[int, Future[Any]] = {}
        self._events: dict[str, queue.Queue[dict[str, Any] | None]] = defaultdict(queue.Queue)
        self._lock = threading.Lock()
        self._sent = 0
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _start(self, module: str, arguments: Sequence[str]) -> Any:
        """The process; a test has a quicker way to start one."""
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, do: str, **given: Any) -> Future[Any]:
        """Begin a call; its answer, or PeerError."""
        future: Future[Any] = Future()
        with self._lock:
            self._sent += 1
            self._calls[self._sent] = future
            message = json.dumps({"id": self._sent, "do": do, "with": given})
            try:
                if self._ended:
                    raise BrokenPipeError
                self._process.stdin.write(message + "\n")
                self._process.stdin.flush()
            except OSError:
                del self._calls[self._sent]
                future.set_exception(PeerError(f"{self._name} is gone"))
        return future

    def call(self, do: str, *, timeout_s: float = CALL_TIMEOUT_S, **given: Any) -> Any:
        """Call and wait for the answer."""
        return self.start(do, **given).result(timeout_s)

    def event(self, name: str, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """The next event of a name; waits for it."""
        with self._lock:
            told = self._events[name]
            if self._ended:
                told.put(None)
        try:
            event = told.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerError(f"{self._name} did not tell {name} in {timeout_s:g} s") from None
        if event is None:
            raise PeerError(f"{self._name} ended before it told {name}")
        return event

    def kill(self) -> None:
        """End it as kill -9 does, and wait until it is gone."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def end(self) -> None:
        """Tell it to end, without waiting."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Let it end by itself; kills what does not."""
        if self._process.poll() is None:
            self.end()
            try:
                self._process.wait(CALL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._process.poll() is None:
            self._process.kill()
        self.close()

    def _read(self) -> None:
        with self._process.stdout as lines:
            for line in lines:
                message = json.loads(line)
                with self._lock:
                    if "event" in message:
                        self._events[message["event"]].put(message)
                        continue
                    future = self._calls.pop(message["id"])
                if "error" in message:
                    future.set_exception(PeerError(f"{self._name}: {message['error']}"))
                else:
                    future.set_result(message["answer"])
        with self._lock:
            self._ended = True
            lost, self._calls = self._calls, {}
            for told in self._events.values():
                told.put(None)
            with contextlib.suppress(OSError):  # what was not flushed has no reader any more
                self._process.stdin.close()
        for future in lost.values():
            future.set_exception(PeerError(f"{self._name} ended"))


class Server:
    """The other side of a `Peer`. Make it first: from then on only it writes to standard output."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._lock = threading.Lock()

    def tell(self, event: str, **details: Any) -> None:
        """Tell an event."""
        self._write({"event": event, **details})

    def serve(self, handlers: Mapping[str, Callable[..., Any]]) -> None:
        """Answer calls until standard input ends; each in a thread of its own."""
        for line in sys.stdin:
            message = json.loads(line)
            handler = handlers[message["do"]]
            threading.Thread(target=self._answer, args=(message, handler), daemon=True).start()

    def _answer(self, message: dict[str, Any], handler: Callable[..., Any]) -> None:
        try:
            answer = {"answer": handler(**message["with"])}
        except Exception as error:  # told to the caller, whatever it is
            answer = {"error": f"{type(error).__name__}: {error}"}
        self._write({"id": message["id"], **answer})

    def _write(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()
