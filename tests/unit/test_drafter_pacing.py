"""When a pass pauses: on a clock that the test moves."""

from __future__ import annotations

import threading

import pytest

from drafter_svc.pacing import Pacer

WORK_S, PAUSE_S = 0.014, 0.015


class Gpu:
    """A clock, the work that is queued on a GPU, and the pauses that were made."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.queued_s = 0.0
        self.finished = 0
        self.paused: list[float] = []
        self.decoding = True
        self.stop = threading.Event()

    def finish(self) -> None:
        self.now_s += self.queued_s
        self.queued_s = 0.0
        self.finished += 1

    def pause(self, stop: threading.Event, seconds: float) -> None:
        assert stop is self.stop
        self.paused.append(seconds)
        self.now_s += seconds

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
            self.queued_s += seconds
            pacer.point(self.finish, self.stop)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


def test_pass_pauses_after_every_share_of_work(gpu: Gpu) -> None:
    gpu.work(pacer := gpu.pacer(), 0.0036, points=12)  # four of them are 14.4 ms
    assert gpu.paused == [PAUSE_S] * 3
    assert pacer.paused_s == pytest.approx(3 * PAUSE_S)


def test_no_pause_before_enough_work_is_done(gpu: Gpu) -> None:
    gpu.work(gpu.pacer(), WORK_S / 2 - 1e-4, points=2)
    assert gpu.paused == []


def test_work_longer_than_its_share_is_followed_by_one_pause(gpu: Gpu) -> None:
    gpu.work(gpu.pacer(), 5 * WORK_S)
    assert gpu.paused == [PAUSE_S]


def test_slices_of_others_are_not_work(gpu: Gpu) -> None:
    pacer = gpu.pacer(share=0.5)
    gpu.work(pacer, WORK_S)
    assert gpu.paused == []
    gpu.work(pacer, WORK_S)
    assert gpu.paused == [PAUSE_S]


def test_time_in_a_pause_is_not_work(gpu: Gpu) -> None:
    pacer = gpu.pacer()
    gpu.work(pacer, WORK_S)
    gpu.work(pacer, WORK_S / 2)
    assert gpu.paused == [PAUSE_S]


def test_nothing_is_waited_for_while_nobody_decodes(gpu: Gpu) -> None:
    gpu.decoding = False
    gpu.work(gpu.pacer(), WORK_S, points=5)
    assert (gpu.finished, gpu.paused) == (0, [])


def test_decoding_that_begins_during_a_pass_is_heeded_at_the_next_point(gpu: Gpu) -> None:
    pacer, gpu.decoding = gpu.pacer(), False
    gpu.work(pacer, WORK_S, points=3)
    gpu.decoding = True
    gpu.work(pacer, 1e-4)
    assert gpu.paused == [PAUSE_S]


def test_pauses_end_when_decoding_does(gpu: Gpu) -> None:
    pacer = gpu.pacer()
    gpu.work(pacer, WORK_S)
    gpu.decoding = False
    gpu.work(pacer, WORK_S, points=3)
    assert gpu.paused == [PAUSE_S]


def test_pause_of_zero_never_waits(gpu: Gpu) -> None:
    gpu.work(gpu.pacer(pause_s=0.0), WORK_S, points=3)
    assert (gpu.finished, gpu.paused) == (0, [])


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
    pacer.point(lambda: None, stop)
    assert pacer.paused_s < 60.0
