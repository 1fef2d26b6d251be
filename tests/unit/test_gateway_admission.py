"""Admission: what is let in, what is refused, and with which hint."""

from __future__ import annotations

import uuid

import pytest

from gateway.admission import FIRST_HINT_S, MOST_HINT_S, Admission
from skim.errors import Busy, InvalidRequest


def test_one_request_more_than_allowed_is_refused_until_one_leaves() -> None:
    admission = Admission(max_requests=2, max_bytes=100)
    with admission.enter():
        with admission.enter():
            with pytest.raises(Busy) as refused:
                admission.enter()
            assert refused.value.reason == "QUEUE_FULL"
            assert refused.value.metadata == {"limit": "2", "got": "3"}
        with admission.enter():
            assert admission.requests == 2
    assert admission.requests == 0


def test_bytes_over_the_budget_are_refused_and_given_back_at_the_end() -> None:
    admission = Admission(max_requests=2, max_bytes=100)
    with admission.enter() as first, admission.enter() as second:
        first.hold(60)
        second.hold(40)
        with pytest.raises(Busy) as refused:
            second.hold(41)
        assert refused.value.reason == "PROMPT_BYTES_LIMIT"
        assert admission.bytes == 100
    assert admission.bytes == 0


def test_holding_again_reserves_only_what_is_new() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    with admission.enter() as ticket:
        ticket.hold(80)
        ticket.hold(50)
        ticket.hold(100)
        assert admission.bytes == 100


def test_the_hint_is_the_mean_time_until_the_next_request_ends() -> None:
    admission = Admission(max_requests=2, max_bytes=100)
    admission.enter()
    admission.enter()
    with pytest.raises(Busy) as refused:
        admission.enter()
    assert refused.value.retry_after_s == FIRST_HINT_S  # nothing measured yet
    admission.leave("", 0, lasted_s=8.0)
    admission.enter()
    with pytest.raises(Busy) as refused:
        admission.enter()
    assert refused.value.retry_after_s == 4.0  # two running, 8 s each
    admission.leave("", 0, lasted_s=13.0)
    admission.enter()
    with pytest.raises(Busy) as refused:
        admission.enter()
    assert refused.value.retry_after_s == 4.5  # mean 8 + 0.2 * (13 - 8) = 9 s


def test_the_hint_is_bounded() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    admission.enter()
    admission.leave("", 0, lasted_s=10_000.0)
    admission.enter()
    with pytest.raises(Busy) as refused:
        admission.enter()
    assert refused.value.retry_after_s == MOST_HINT_S


def test_an_id_in_flight_is_refused_and_free_again_afterwards() -> None:
    admission = Admission(max_requests=2, max_bytes=100)
    with admission.enter() as first, admission.enter() as second:
        first.identify("same")
        with pytest.raises(InvalidRequest) as refused:
            second.identify("same")
        assert refused.value.reason == "REQUEST_ID_IN_USE"
    with admission.enter() as third:
        third.identify("same")


def test_a_refused_id_stays_with_its_holder() -> None:
    admission = Admission(max_requests=3, max_bytes=100)
    with admission.enter() as first:
        first.identify("same")
        for _ in range(2):
            with pytest.raises(InvalidRequest), admission.enter() as other:
                other.identify("same")


def test_an_empty_id_becomes_a_uuid() -> None:
    with Admission(1, 1).enter() as ticket:
        ticket.identify("")
        assert uuid.UUID(ticket.request_id)


@pytest.mark.parametrize("request_id", ["a b", "x" * 65, "ümlaut", "a/b", "a\n"])
def test_a_malformed_id_is_refused(request_id: str) -> None:
    with Admission(1, 1).enter() as ticket, pytest.raises(InvalidRequest) as refused:
        ticket.identify(request_id)
    assert refused.value.field == "config.request_id"
