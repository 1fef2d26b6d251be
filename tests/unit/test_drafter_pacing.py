"""When a pass pauses: on a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from drafter_svc.pacing import Pacer

WORK_S, PAUSE_S = 0.014, 0.015
LAUNCH_S = 1e-6  # the host needs for a piece


class Gpu:
    """A clock, a GPU that works off its queue beside it, and the pauses that were made."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.done_s = 0.0  # when all that is queued will be done
        self.recorded = 0
        self.idle = 0  # times that work found the queue empty
        self.paused: list[float] = []
        self.decoding = True
        self.stop = threading.Event()

    def record(self) -> Callable[[], None]:
        reached_s = self.done_s
        self.recorded += 1

        def wait() -> None:
            self.now_s = max(self.now_s, reached_s)

        return wait

    def pause(self, stop: threading.Event, seconds: float) -> None:
        assert stop is self.stop
        assert self.now_s >= self.done_s, "a pause with work in the queue is none"
        self.paused.append(seconds)
        self.now_s += seconds
        self.done_s = self.now_s

    def pacer(
        self, work_s: float = WORK_S, pause_s: float = PAUSE_S, *, share: float = 1.0
    ) -> Pacer:
        made = Pacer(
            work_s,
            pause_s,
            lambda: self.decoding,
            share=share,
            clock=lambda: self.now_s,
            pause=self.pause,
        )
        made.begin()
        return made

    def work(self, pacer: Pacer, seconds: float, points: int = 1) -> None:
        """Queue so much work before each of so many points."""
        for _ in range(points):
            self.now_s += LAUNCH_S
            if self.now_s > self.done_s:
                self.idle += 1
            self.done_s = max(self.now_s, self.done_s) + seconds
            pacer.point(self.record, self.stop)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


def test_pass_pauses_after_every_share_of_work(gpu: Gpu) -> None:
    # Four pieces are 14.4 ms; when they are known to be done, the fifth is queued already.
    gpu.work(pacer := gpu.pacer(), 0.0036, points=15)
    assert gpu.paused == [PAUSE_S] * 3
    assert pacer.paused_s == pytest.approx(3 * PAUSE_S)


def test_gpu_never_waits_for_the_host_between_pauses(gpu: Gpu) -> None:
    gpu.work(gpu.pacer(), 0.0007, points=200)
    assert len(gpu.paused) > 5
    assert gpu.idle == 1 + len(gpu.paused)  # at the start and after each pause


def test_no_pause_before_enough_work_is_done(gpu: Gpu) -> None:
    gpu.work(gpu.pacer(), WORK_S / 3 - 1e-4, points=3)
    assert gpu.paused == []


def test_work_longer_than_its_share_is_followed_by_one_pause(gpu: Gpu) -> None:
    gpu.work(gpu.pacer(), 5 * WORK_S, points=2)
    assert gpu.paused == [PAUSE_S]


def test_slices_of_others_are_not_work(gpu: Gpu) -> None:
    pacer = gpu.pacer(share=0.5)
    gpu.work(pacer, WORK_S, points=2)
    assert gpu.paused == []
    gpu.work(pacer, WORK_S)
    assert gpu.paused == [PAUSE_S]


def test_time_in_a_pause_is_not_work(gpu: Gpu) -> None:
    pacer = gpu.pacer()
    gpu.work(pacer, WORK_S, points=2)
    gpu.work(pacer, WORK_S / 3, points=3)
    assert gpu.paused == [PAUSE_S]


def test_nothing_is_waited_for_while_nobody_decodes(gpu: Gpu) -> None:
    gpu.decoding = False
    gpu.work(gpu.pacer(), WORK_S, points=5)
    assert (gpu.recorded, gpu.paused) == (0, [])


def test_decoding_that_begins_during_a_pass_is_heeded_at_the_next_point(gpu: Gpu) -> None:
    pacer, gpu.decoding = gpu.pacer(), False
    gpu.work(pacer, WORK_S, points=3)
    gpu.now_s, gpu.decoding = gpu.done_s, True
    gpu.work(pacer, 1e-4)
    assert gpu.paused == [PAUSE_S]


def test_pauses_end_when_decoding_does(gpu: Gpu) -> None:
    pacer = gpu.pacer()
    gpu.work(pacer, WORK_S, points=2)
    gpu.decoding = False
    gpu.work(pacer, WORK_S, points=3)
    assert gpu.paused == [PAUSE_S]


def test_pause_of_zero_never_waits(gpu: Gpu) -> None:
    gpu.work(gpu.pacer(pause_s=0.0), WORK_S, points=3)
    assert (gpu.recorded, gpu.paused) == (0, [])


def test_share_of_zero_pauses_at_every_point(gpu: Gpu) -> None:
    gpu.work(gpu.pacer(work_s=0.0), 1e-4, points=3)
    assert gpu.paused == [PAUSE_S] * 3


def test_every_pass_begins_with_a_full_share(gpu: Gpu) -> None:
    pacer = gpu.pacer()
    gpu.now_s += 60.0
    pacer.begin()
    gpu.work(pacer, WORK_S / 2)
    assert gpu.paused == []


def test_stopped_pass_leaves_its_pause_at_once() -> None:
    stop = threading.Event()
    stop.set()
    pacer = Pacer(0.0, 3_600.0, lambda: True)
    pacer.begin()
    pacer.point(lambda: lambda: None, stop)
    assert pacer.paused_s < 60.0
