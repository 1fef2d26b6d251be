"""Which steps of an answer count beside which passes, and answers that do not come to their end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bench.decode_clock import Answering, Pass, score_once, spread_ms, steps_of, steps_within
from skim.client_types import Progress, Text
from skim.errors import DeadlineExceeded, EngineFault, Unavailable
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2


def a_pass(began_s: float, ended_s: float) -> Pass:
    return Pass(began_s, ended_s, ended_s - began_s, 0.05)


def test_tokens_that_came_together_share_the_time_since_those_before() -> None:
    assert steps_of([(1.0, 1), (1.5, 1), (2.5, 4)]) == [0.5, 0.25, 0.25, 0.25, 0.25]


def test_only_steps_that_lie_within_one_pass_count() -> None:
    arrivals = [(0.0, 1), (1.0, 1), (3.0, 1), (7.0, 1), (15.0, 1), (31.0, 1)]
    passes = [a_pass(0.5, 8.0), a_pass(8.5, 40.0)]
    # 0 to 1 begins before the first pass, 7 to 15 lies across both.
    assert steps_within(arrivals, passes) == [2.0, 4.0, 16.0]


def test_spread_is_in_milliseconds() -> None:
    spread = spread_ms([0.001 * value for value in range(101)])
    assert spread == pytest.approx({"p50": 50.0, "p99": 99.0, "min": 0.0, "max": 100.0, "n": 101})


class Stream:
    """An answer that stands still, fails or ends after its events, until it is cancelled."""

    def __init__(self, events: list[Any], end: Exception | None, *, still: bool = False) -> None:
        self._events, self._end = events, end
        self.cancelled = threading.Event()
        if not still:
            self.cancelled.set()

    def __iter__(self) -> Iterator[Any]:
        yield from self._events
        assert self.cancelled.wait(10.0)
        if self._end is not None:
            raise self._end

    def cancel(self) -> None:
        self.cancelled.set()


class FakeClient:
    """Gives one stream; `asked` are the options."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def generate(self, prompt: bytes, **options: Any) -> Stream:
        self.asked = options
        return self._stream


def answering(stream: Stream) -> Answering:
    client: Any = FakeClient(stream)
    return Answering(client, b"prompt", 8, deadline_s=10.0)


TOKENS = [Progress("prefill", 1, 1), Text("a", (1,)), Text("", (2, 3))]


def test_answer_is_drawn_token_by_token_to_its_full_length() -> None:
    client: Any = FakeClient(Stream([], None))
    Answering(client, b"prompt", 8, deadline_s=10.0)
    asked = {name: client.asked[name] for name in ("ignore_eos", "speculation", "max_tokens")}
    assert asked == {"ignore_eos": True, "speculation": False, "max_tokens": 8}


def test_arrivals_of_tokens_are_noted_and_leaving_cancels_without_a_failure() -> None:
    stream = Stream(TOKENS, Unavailable("cancelled"), still=True)
    with answering(stream) as answer:
        answer.wait_for(3, 10.0)
        assert not answer.ended
    assert stream.cancelled.is_set()
    assert [count for _, count in answer.arrivals] == [1, 2]
    assert answer.ended


def test_waiting_for_more_tokens_than_come_ends_at_the_timeout() -> None:
    with answering(Stream(TOKENS, None, still=True)) as answer, pytest.raises(DeadlineExceeded):
        answer.wait_for(4, 0.01)


@pytest.mark.parametrize(
    ("end", "error"), [(None, EngineFault), (Unavailable("the target is gone"), Unavailable)]
)
def test_waiting_for_an_answer_that_ended_early_says_why(
    end: Exception | None, error: type[Exception]
) -> None:
    with answering(Stream(TOKENS, end)) as answer, pytest.raises(error):
        answer.wait_for(4, 10.0)


class FakeStub:
    """A drafter that answers the given messages."""

    def __init__(self, *responses: drafter_pb2.ScoreResponse) -> None:
        self._responses = responses

    def Score(self, requests: Iterator[Any], timeout: float) -> Iterator[Any]:
        self.requests = list(requests)
        return iter(self._responses)


SCORING = drafter_pb2.ScoreResponse(progress=pb.Progress(stage=pb.STAGE_SCORE, total=2))
RESULT = drafter_pb2.ScoreResponse(
    result=drafter_pb2.ScoreResult(forward_s=0.25, select_s=0.5, layer_density=[0.25, 0.75])
)


def test_pass_is_that_of_the_drafters_clock_and_ends_before_the_selection() -> None:
    one = score_once(FakeStub(SCORING, RESULT), b"prompt", keep_ratio=0.05, timeout_s=1.0)
    assert (one.forward_s, one.density) == (0.25, 0.5)
    # Both messages come at once here, so half a second of selection ends before the beginning.
    assert one.ended_s - one.began_s == pytest.approx(-0.5, abs=0.1)


def test_pass_that_never_began_is_an_error() -> None:
    with pytest.raises(EngineFault):
        score_once(FakeStub(RESULT), b"prompt", keep_ratio=0.05, timeout_s=1.0)
