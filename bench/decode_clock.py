"""When an answer's tokens and a drafter's passes came, by the client's clock; and what follows.

Used by `bench.decode_beside`: `Answering` reads one answer in a thread of its own, `score_once`
asks the drafter for a pass at its own door. A decode step counts only where it lies within a pass.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from skim.client import Client
from skim.client_types import Text
from skim.errors import DeadlineExceeded, EngineFault, SkimError
from skim.rpc_errors import from_rpc_error
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2
from skim.wire import prompt_end, split_parts

PART_BYTES = 256 << 10
JOIN_TIMEOUT_S = 10.0

Arrival = tuple[float, int]  # when, and how many tokens


@dataclass(frozen=True)
class Pass:
    """One pass of the drafter.

    Attributes:
        began_s, ended_s: on the client's clock, as the drafter's messages arrived; the selection
            after the pass is not in it.
        forward_s: its length by the drafter's own clock, pauses included.
        density: mean over its layers.
    """

    began_s: float
    ended_s: float
    forward_s: float
    density: float


class Answering:
    """One answer, read in a thread; leaving the `with` block stops the request.

    Args:
        client: to the gateway.
        prompt: is prefilled whole.
        max_tokens: of the answer, drawn one by one: no drafting, no end before these.
        deadline_s: of the whole answer.
    """

    def __init__(
        self, client: Client, prompt: bytes, max_tokens: int, *, deadline_s: float
    ) -> None:
        self._stream = client.generate(
            prompt,
            stream=True,
            mode="full",
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            speculation=False,
            deadline_s=deadline_s,
        )
        self.arrivals: list[Arrival] = []
        self._changed = threading.Condition()
        self._ended = self._stopping = False
        self._failure: SkimError | None = None
        self._thread = threading.Thread(target=self._read, name="answering", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        self._stream.cancel()
        self._thread.join(JOIN_TIMEOUT_S)

    @property
    def ended(self) -> bool:
        """Whether its last token has come.

        Raises:
            SkimError: it failed.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            return self._ended

    def wait_for(self, num_tokens: int, timeout_s: float) -> None:
        """Wait until so many tokens have come.

        Raises:
            DeadlineExceeded: they have not.
            SkimError: the answer failed.
            EngineFault: it ended with fewer.
        """

        def settled() -> bool:
            return self._ended or sum(count for _, count in self.arrivals) >= num_tokens

        with self._changed:
            done = self._changed.wait_for(settled, timeout_s)
            got = sum(count for _, count in self.arrivals)
        if self.ended and got < num_tokens:
            raise EngineFault(f"the answer ended with {got} tokens, not {num_tokens}")
        if not done:
            raise DeadlineExceeded(f"{got} tokens came in {timeout_s:.0f} s, not {num_tokens}")

    def _read(self) -> None:
        failure = None
        try:
            for event in self._stream:
                if isinstance(event, Text) and event.token_ids:
                    with self._changed:
                        self.arrivals.append((time.monotonic(), len(event.token_ids)))
                        self._changed.notify_all()
        except SkimError as error:
            failure = None if self._stopping else error
        with self._changed:
            self._failure, self._ended = failure, True
            self._changed.notify_all()


def score_once(stub: Any, prompt: bytes, *, keep_ratio: float, timeout_s: float) -> Pass:
    """Ask the drafter for one pass and wait for its end.

    Args:
        stub: of DrafterService.
    Raises:
        SkimError: it was refused or failed.
        EngineFault: the pass never began, or had no end.
    """
    began_s = None
    try:
        for response in stub.Score(_requests(prompt, keep_ratio), timeout=timeout_s):
            now_s = time.monotonic()
            if response.WhichOneof("event") == "result" and began_s is not None:
                result = response.result
                density = float(np.mean(result.layer_density)) if result.layer_density else 0.0
                return Pass(began_s, now_s - result.select_s, result.forward_s, density)
            if response.progress.stage == pb.STAGE_SCORE and began_s is None:
                began_s = now_s
    except grpc.RpcError as failure:
        raise from_rpc_error(failure) from failure
    raise EngineFault("the drafter told neither progress nor a result of the pass")


def _requests(prompt: bytes, keep_ratio: float) -> Iterator[drafter_pb2.ScoreRequest]:
    request_id = f"beside-{uuid.uuid4().hex[:12]}"
    selection = pb.SelectionConfig(keep_ratio=keep_ratio)
    config = drafter_pb2.ScoreConfig(request_id=request_id, selection=selection)
    yield drafter_pb2.ScoreRequest(config=config)
    for part in split_parts(prompt, PART_BYTES):
        yield drafter_pb2.ScoreRequest(prompt=part)
    yield drafter_pb2.ScoreRequest(end=prompt_end(prompt))


def steps_of(arrivals: Sequence[Arrival]) -> list[float]:
    """Seconds of each decode step; tokens that came together share the time since those before."""
    pairs = zip(arrivals, arrivals[1:], strict=False)
    return [step for before, after in pairs for step in _shares(before, after)]


def steps_within(arrivals: Sequence[Arrival], passes: Sequence[Pass]) -> list[float]:
    """Seconds of each step that begins and ends within one and the same pass."""
    return [
        step
        for one in passes
        for before, after in zip(arrivals, arrivals[1:], strict=False)
        if one.began_s <= before[0] and after[0] <= one.ended_s
        for step in _shares(before, after)
    ]


def _shares(before: Arrival, after: Arrival) -> list[float]:
    return [(after[0] - before[0]) / after[1]] * after[1]


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile, least and most of at least one time, in milliseconds."""
    values = np.asarray(seconds) * 1e3
    names = {"p50": 50, "p99": 99, "min": 0, "max": 100}
    return {k: float(np.percentile(values, q)) for k, q in names.items()} | {"n": len(seconds)}
