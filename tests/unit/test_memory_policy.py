"""Who is parked, who comes back and who is refused, by tables. Times in seconds, sizes in units."""

from __future__ import annotations

from typing import Any

import pytest

from target_svc.memory.policy import (
    Enough,
    Hold,
    Impossible,
    Park,
    RegionFacts,
    RoomStep,
    Rules,
    Wait,
    comes_back,
    free_for_region,
    goes_down,
    region_need,
    room_step,
)

NOW_S = 100.0
BUDGET = 100
AUTO, ALWAYS, NEVER = (Rules(policy) for policy in ("auto", "always", "never"))


def region(name: str = "a", state: Any = "RESIDENT", size: int = 10, **facts: Any) -> RegionFacts:
    return RegionFacts(name, state, size, **facts)


def step(need: int, free: int, *regions: RegionFacts, rules: Rules = AUTO) -> RoomStep:
    return room_step(
        rules, regions, need_bytes=need, free_bytes=free, budget_bytes=BUDGET, now_s=NOW_S
    )


@pytest.mark.parametrize("rules", [AUTO, ALWAYS, NEVER])
def test_free_bytes_are_enough_under_every_policy(rules: Rules) -> None:
    assert step(20, 20, region(), rules=rules) == Enough()


@pytest.mark.parametrize("rules", [AUTO, ALWAYS])
def test_a_resident_region_is_parked_for_what_is_missing(rules: Rules) -> None:
    assert step(30, 20, region(), rules=rules) == Park(("a",))


def test_never_parks_nobody() -> None:
    assert step(30, 20, region(), rules=NEVER) == Impossible(20)


def test_what_exceeds_the_budget_parks_nobody() -> None:
    assert step(BUDGET + 1, 20, region()) == Impossible(20)


def test_as_few_as_possible_are_parked_the_largest_first() -> None:
    regions = (region("small", size=5), region("large", size=30), region("middle", size=20))
    assert step(50, 20, *regions) == Park(("large",))
    assert step(60, 20, *regions) == Park(("large", "middle"))


def test_whom_nobody_holds_goes_before_all_others() -> None:
    orphan = region("orphan", size=5, leased=False)
    assert step(25, 20, region("leased", size=30), orphan) == Park(("orphan",))
    assert step(30, 20, region("leased", size=30), orphan) == Park(("orphan", "leased"))


def test_where_sizes_do_not_suffice_all_go_for_their_workspaces() -> None:
    assert step(90, 20, region("a"), region("b")) == Park(("a", "b"))


def test_with_nobody_left_to_park_it_is_impossible() -> None:
    assert step(90, 20, region(state="PARKED"), region("b", state="FAILED")) == Impossible(20)
    assert step(90, -5) == Impossible(0)


@pytest.mark.parametrize("state", ["PARKING", "UNPARKING", "RESIDENT", "PARKED"])
def test_a_region_on_the_move_is_waited_for(state: Any) -> None:
    assert step(30, 20, region(state=state, moving=True)) == Wait(None)


def test_a_copy_is_waited_for_as_long_as_it_may_take() -> None:
    rules = Rules("auto", min_resident_s=2.0, unpark_grace_s=5.0)
    copying = region(state="UNPARKING", since_s=NOW_S - 1.0)
    assert step(30, 20, copying, rules=rules) == Wait(NOW_S + 4.0)
    hanging = region(state="UNPARKING", since_s=NOW_S - 5.0)
    assert step(30, 20, hanging, rules=rules) == Park(("a",))


@pytest.mark.parametrize(
    ("rules", "facts", "expected"),
    [
        (AUTO, {"returned_s": NOW_S - 0.5}, Wait(NOW_S + 1.5)),
        (AUTO, {"returned_s": NOW_S - 2.0}, Park(("a",))),
        (AUTO, {"returned_s": None}, Park(("a",))),
        (AUTO, {"returned_s": NOW_S - 0.5, "leased": False}, Park(("a",))),
        (ALWAYS, {"returned_s": NOW_S - 0.5}, Park(("a",))),
    ],
)
def test_who_came_back_stays_its_time_under_auto_alone(
    rules: Rules, facts: dict[str, Any], expected: RoomStep
) -> None:
    assert step(30, 20, region(**facts), rules=rules) == expected


def test_nobody_is_parked_for_a_sum_that_needs_one_who_stays() -> None:
    staying = region("staying", returned_s=NOW_S - 0.5)
    assert step(40, 20, region("ready"), staying) == Wait(NOW_S + 1.5)
    assert step(30, 20, region("ready"), staying) == Park(("ready",))


def test_the_first_of_several_that_may_go_is_waited_for() -> None:
    regions = (region("a", returned_s=NOW_S - 0.5), region("b", returned_s=NOW_S - 1.5))
    assert step(30, 20, *regions) == Wait(NOW_S + 0.5)


@pytest.mark.parametrize("rules", [AUTO, ALWAYS, NEVER])
@pytest.mark.parametrize("state", ["PARKED", "FAILED"])
def test_whoever_is_wanted_comes_back(rules: Rules, state: Any) -> None:
    wanted = region(state=state, wanted=True, kept_down=True)
    assert comes_back(rules, wanted, rooms_waiting=True)


@pytest.mark.parametrize(
    ("rules", "facts", "rooms_waiting", "expected"),
    [
        (AUTO, {}, False, True),
        (NEVER, {}, False, True),
        (ALWAYS, {}, False, False),
        (AUTO, {}, True, False),  # the next full context would park it again
        (AUTO, {"kept_down": True}, False, False),
        (AUTO, {"leased": False}, False, False),
        (AUTO, {"leased": False, "wanted": True}, False, False),
        (AUTO, {"moving": True, "wanted": True}, False, False),
    ],
)
def test_who_comes_back_unasked(
    rules: Rules, facts: dict[str, Any], rooms_waiting: bool, expected: bool
) -> None:
    parked = region(state="PARKED", **facts)
    assert comes_back(rules, parked, rooms_waiting=rooms_waiting) is expected


@pytest.mark.parametrize("state", ["RESIDENT", "PARKING", "UNPARKING"])
def test_who_is_on_the_device_does_not_come_back(state: Any) -> None:
    assert not comes_back(AUTO, region(state=state, wanted=True), rooms_waiting=False)


@pytest.mark.parametrize(
    ("rules", "facts", "expected"),
    [
        (ALWAYS, {}, True),
        (ALWAYS, {"leased": False}, True),
        (ALWAYS, {"busy": True}, False),
        (ALWAYS, {"moving": True}, False),
        (ALWAYS, {"state": "UNPARKING"}, False),
        (AUTO, {}, False),
        (NEVER, {}, False),
    ],
)
def test_who_is_idle_goes_down_under_always_alone(
    rules: Rules, facts: dict[str, Any], expected: bool
) -> None:
    assert goes_down(rules, region(**facts)) is expected


@pytest.mark.parametrize(
    ("hold", "others", "expected"),
    [
        (None, 50, 40),
        (Hold(30), 50, 10),  # not granted yet: all of it is to come
        (Hold(30, 50), 50, 10),  # granted, nothing taken
        (Hold(30, 50), 60, 20),  # a third taken
        (Hold(30, 50), 80, 40),  # all taken: it is in what is used
        (Hold(30, 50), 95, 40),  # others took more besides
        (Hold(30, 50), 45, 10),  # somebody else gave something back
    ],
)
def test_a_promise_counts_until_it_is_taken_and_not_twice(
    hold: Hold | None, others: int, expected: int
) -> None:
    assert free_for_region(hold, free_bytes=40, others_bytes=others) == expected


def test_beside_a_promise_the_workspace_counts_too() -> None:
    facts = region(size=10, workspace_bytes=7)
    assert region_need(facts, None) == 10
    assert region_need(facts, Hold(1)) == 17
