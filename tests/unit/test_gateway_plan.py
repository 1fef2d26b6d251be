"""The plan as a table: what happened, in order, and what is decided."""

from __future__ import annotations

import pytest

from gateway.plan import LATE_UNMEASURED_S, Full, Mode, Planner, Reason, Skim
from skim.spans import Span

SPANS = (Span(3, 9),)
MIN = 100

# A step is a method of the planner and its arguments; `late` moves the clock.
UPLOADED = ("uploaded", 10.0, True)
UNASKED = ("uploaded", 10.0, False)
SHORT = ("tokenised", MIN - 1, 40.0)
LONG = ("tokenised", MIN, 40.0)  # a quarter of 40 s: late after 10 s
SCORED = ("scored", SPANS, None)
LOW = ("scored", SPANS, "0.8 of 0.9")
FAILED = ("score_failed", Reason.DRAFTER_FAILED, "it died")
REFUSED = ("score_failed", Reason.SPANS_REFUSED, "touching")


def plan(mode: Mode = Mode.AUTO, **settings: object) -> Planner:
    return Planner(mode=mode, skim_min_tokens=MIN, **settings)  # type: ignore[arg-type]


def play(planner: Planner, steps: list[tuple[object, ...]]) -> None:
    for name, *arguments in steps:
        if name == "uploaded":
            planner.uploaded(arguments[0], score_open=arguments[1])  # type: ignore[arg-type]
        elif name == "scored":
            planner.scored(arguments[0], low_coverage=arguments[1])  # type: ignore[arg-type]
        else:
            getattr(planner, str(name))(*arguments)


@pytest.mark.parametrize(
    ("steps", "decision"),
    [
        ([UPLOADED, LONG, SCORED], Skim(SPANS)),
        ([UPLOADED, SCORED, LONG], Skim(SPANS)),
        ([UPLOADED, SHORT, SCORED], Full(Reason.SHORT_PROMPT)),
        ([UPLOADED, SCORED, SHORT], Full(Reason.SHORT_PROMPT)),
        ([UPLOADED, SCORED], None),
        ([UPLOADED, LONG], None),
        ([UNASKED], Full(Reason.SHORT_PROMPT)),
        ([UPLOADED, LONG, FAILED], Full(Reason.DRAFTER_FAILED, "it died")),
        ([FAILED], Full(Reason.DRAFTER_FAILED, "it died")),
        ([FAILED, UPLOADED, SHORT], Full(Reason.DRAFTER_FAILED, "it died")),
        ([UPLOADED, LONG, REFUSED], Full(Reason.SPANS_REFUSED, "touching")),
        ([UPLOADED, LONG, LOW], Full(Reason.LOW_COVERAGE, "0.8 of 0.9", SPANS)),
        ([UPLOADED, LOW, SHORT], Full(Reason.SHORT_PROMPT)),
        ([UPLOADED, LONG, ("time_passed", 20.0)], "late"),
        ([UPLOADED, LONG, ("time_passed", 19.9)], None),
        ([UPLOADED, LONG, ("time_passed", 20.0), SCORED], "late"),
        ([UPLOADED, SCORED, ("time_passed", 1e9)], None),
        ([UPLOADED, SCORED, FAILED, LONG], Skim(SPANS)),  # its answer was complete
    ],
)
def test_auto_decides(steps: list[tuple[object, ...]], decision: object) -> None:
    planner = plan()
    play(planner, steps)
    if decision == "late":
        assert isinstance(planner.decision, Full)
        assert planner.decision.reason is Reason.DRAFTER_LATE
        assert "10.00 s" in planner.decision.detail
    else:
        assert planner.decision == decision


@pytest.mark.parametrize(
    ("steps", "decision"),
    [
        ([UPLOADED, SCORED], Skim(SPANS)),
        ([UPLOADED, SHORT, SCORED], Skim(SPANS)),
        ([UPLOADED, LOW], Full(Reason.LOW_COVERAGE, "0.8 of 0.9", SPANS)),
        ([UPLOADED, FAILED], Full(Reason.DRAFTER_FAILED, "it died")),
    ],
)
def test_skim_decides_without_a_count(steps: list[tuple[object, ...]], decision: object) -> None:
    planner = plan(Mode.SKIM)
    play(planner, steps)
    assert planner.decision == decision


def test_full_is_decided_from_the_start_whatever_the_drafter() -> None:
    assert plan(Mode.FULL).decision == Full(Reason.FORCED)
    assert plan(Mode.FULL, no_drafter="gone").decision == Full(Reason.FORCED)


@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.SKIM])
def test_no_drafter_is_decided_from_the_start_and_says_why(mode: Mode) -> None:
    assert plan(mode, no_drafter="it is gone").decision == Full(Reason.NO_DRAFTER, "it is gone")


def test_a_decision_never_changes() -> None:
    planner = plan()
    play(planner, [UPLOADED, LONG, SCORED, FAILED, ("time_passed", 1e9), LOW])
    assert planner.decision == Skim(SPANS)


@pytest.mark.parametrize(
    ("mode", "known_bytes", "opens"),
    [
        (Mode.AUTO, MIN - 1, False),
        (Mode.AUTO, MIN, True),
        (Mode.SKIM, 0, True),
        (Mode.FULL, 10 * MIN, False),
    ],
)
def test_a_score_opens_when_enough_bytes_are_known(
    mode: Mode, known_bytes: int, opens: bool
) -> None:
    assert plan(mode).opens_score(known_bytes) is opens


def test_no_score_opens_without_a_drafter() -> None:
    assert not plan(no_drafter="gone").opens_score(10 * MIN)


def test_the_late_clock_stands_while_the_drafter_queues() -> None:
    planner = plan()
    play(planner, [UPLOADED, LONG, ("queued", 13.0)])
    assert planner.late_at_s() is None
    play(planner, [("time_passed", 1_000.0)])
    assert planner.decision is None
    # 3 s ran before the queue, so 7 of the 10 s are left when the pass starts.
    play(planner, [("running", 1_000.0)])
    assert planner.late_at_s() == 1_007.0


def test_the_late_clock_stands_for_a_request_queued_before_the_upload_ended() -> None:
    planner = plan()
    play(planner, [("queued", 5.0), UPLOADED, LONG])
    assert planner.late_at_s() is None


def test_a_silent_drafter_is_late_from_the_end_of_the_upload() -> None:
    planner = plan()
    play(planner, [LONG])
    assert planner.late_at_s() is None
    play(planner, [UPLOADED])
    assert planner.late_at_s() == 20.0


def test_progress_does_not_restart_the_late_clock() -> None:
    planner = plan()
    play(planner, [UPLOADED, LONG, ("running", 15.0), ("running", 18.0)])
    assert planner.late_at_s() == 20.0


@pytest.mark.parametrize(
    ("estimate_s", "late_after_s"), [(40.0, 10.0), (4.0, 2.0), (0.0, LATE_UNMEASURED_S)]
)
def test_late_is_a_quarter_of_the_predicted_full_prefill_and_two_seconds_at_least(
    estimate_s: float, late_after_s: float
) -> None:
    planner = plan()
    play(planner, [UPLOADED, ("tokenised", MIN, estimate_s)])
    assert planner.late_at_s() == 10.0 + late_after_s


def test_late_is_unknown_before_the_target_predicts() -> None:
    planner = plan()
    play(planner, [UPLOADED])
    assert planner.late_at_s() is None


def test_a_set_timeout_beats_the_prediction() -> None:
    planner = plan(score_timeout_s=1.0)
    play(planner, [UPLOADED])
    assert planner.late_at_s() == 11.0
    play(planner, [LONG])
    assert planner.late_at_s() == 11.0
