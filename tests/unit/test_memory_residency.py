"""The states of a region and what a generation proves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skim.errors import EngineFault
from target_svc.memory.residency import Residency, State, Step

STATES: tuple[State, ...] = ("RESIDENT", "PARKING", "PARKED", "UNPARKING", "FAILED")
Move = Callable[[Residency], Residency]
# Each step: from where it may be taken, where it leads, and whether the generation grows.
STEPS: list[tuple[Move, tuple[State, ...], State, int]] = [
    (Residency.all_loaded, ("UNPARKING",), "RESIDENT", 0),
    (Residency.interrupted, ("UNPARKING",), "RESIDENT", 0),
    (Residency.resumed, ("RESIDENT",), "UNPARKING", 0),
    (Residency.parking, ("RESIDENT", "UNPARKING"), "PARKING", 0),
    (Residency.parked, ("PARKING",), "PARKED", 1),
    (Residency.failed, ("PARKING",), "FAILED", 1),
    (Residency.found_free, ("FAILED",), "PARKED", 0),
    (Residency.unparking, ("PARKED", "FAILED"), "UNPARKING", 1),
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("step", "allowed", "to", "grown"), STEPS)
def test_a_step_is_taken_from_its_states_alone(
    step: Move, allowed: tuple[State, ...], to: State, grown: int, state: State
) -> None:
    before = Residency(state, 5, loaded=False)
    if state not in allowed:
        with pytest.raises(EngineFault):
            step(before)
        return
    after = step(before)
    assert (after.state, after.generation) == (to, 5 + grown)


def test_only_a_finished_copy_loads_a_region_and_every_park_unloads_it() -> None:
    filling = Residency()
    assert (filling.state, filling.generation, filling.loaded) == ("UNPARKING", 1, False)
    assert not filling.interrupted().loaded
    assert not filling.parking().parked().loaded
    loaded = filling.all_loaded()
    assert loaded.loaded and loaded.parking().loaded
    for away in (loaded.parking().parked(), loaded.parking().failed()):
        assert not away.loaded and not away.unparking().loaded


def test_a_loaded_region_is_not_loaded_again() -> None:
    with pytest.raises(EngineFault):
        Residency("RESIDENT", 1, loaded=True).resumed()


@pytest.mark.parametrize("state", STATES)
def test_memory_stands_behind_every_state_but_the_parked_ones(state: State) -> None:
    assert Residency(state, 1).has_memory == (state not in ("PARKED", "FAILED"))


def test_a_message_is_of_now_of_the_past_or_of_no_generation_ever_given() -> None:
    region = Residency("RESIDENT", 3)
    assert [region.age(generation) for generation in (2, 3, 4)] == ["older", "now", "newer"]


@pytest.mark.parametrize(
    ("state", "steps"),
    [  # for a Park that saw 0 (any), 3, 4, 5 (now), 6
        ("RESIDENT", ("move", "mismatch", "mismatch", "move", "mismatch")),
        ("UNPARKING", ("move", "mismatch", "mismatch", "move", "mismatch")),
        ("PARKING", ("join", "mismatch", "mismatch", "join", "mismatch")),
        ("PARKED", ("done", "mismatch", "done", "done", "mismatch")),
        ("FAILED", ("move", "mismatch", "move", "move", "mismatch")),
    ],
)
def test_a_park_is_idempotent_by_generation(state: State, steps: tuple[Step, ...]) -> None:
    region = Residency(state, 5, loaded=True)
    assert tuple(region.park_step(seen) for seen in (0, 3, 4, 5, 6)) == steps


@pytest.mark.parametrize(
    ("state", "loaded", "steps"),
    [  # for an Unpark that saw 0 (any), 3, 4, 5 (now), 6
        ("RESIDENT", True, ("done", "mismatch", "done", "done", "mismatch")),
        ("RESIDENT", False, ("join", "mismatch", "join", "join", "mismatch")),
        ("UNPARKING", False, ("join", "mismatch", "join", "join", "mismatch")),
        ("PARKING", True, ("move", "mismatch", "mismatch", "move", "mismatch")),
        ("PARKED", False, ("move", "mismatch", "mismatch", "move", "mismatch")),
        ("FAILED", False, ("move", "mismatch", "mismatch", "move", "mismatch")),
    ],
)
def test_an_unpark_is_idempotent_by_generation(
    state: State, loaded: bool, steps: tuple[Step, ...]
) -> None:
    region = Residency(state, 5, loaded)
    assert tuple(region.unpark_step(seen) for seen in (0, 3, 4, 5, 6)) == steps
