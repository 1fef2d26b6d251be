"""A drafter gives its memory back: at rest, during a pass, for another model, and gets it again."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from drafter_svc.backend import ScoreInput
from drafter_svc.residency import Phase
from kernels.ipc.messages import Hello, Idle, Quiesce, State, Unmapped, Want
from skim.errors import Cancelled
from tests.emulator.device import EmulatedDevice
from tests.fixtures.cuda_backend import model, prompt
from tests.fixtures.landlord import WAIT_S, Known, Peer, Registered, ScriptedLandlord, Tenant
from tests.tools import open_descriptors

REQUEST = ScoreInput(prompt(130, seed=1))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def resident(landlord: ScriptedLandlord, tenant: Tenant, path: Path) -> Registered:
    """A drafter whose weights were filled and are on the device."""
    return landlord.register(tenant, path)


class HeldPass:
    """Progress that stops a pass after its first layer until it is let on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, done: int, total: int) -> None:
        if done == 1:
            self.reached.set()
            assert self.go_on.wait(WAIT_S)


def test_parked_region_is_free_and_the_workspace_with_it(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    tenant.score(resident.backend, REQUEST).result(WAIT_S)
    workspace_bytes = resident.backend.workspace.num_bytes
    assert workspace_bytes > 0
    unmapped, freed = landlord.park(resident.peer, resident.known)
    assert freed == resident.known.size_bytes and landlord.physical.used_bytes() == 0
    assert unmapped.workspace_bytes == workspace_bytes
    assert tenant.device.free_bytes() == tenant.device.total_bytes
    assert resident.place.residency.phase is Phase.PARKED


def test_unparked_weights_score_as_before_at_the_same_addresses(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered, path: Path
) -> None:
    before = tenant.score(resident.backend, REQUEST).result(WAIT_S)
    addresses = dict(resident.backend.weights.addresses)
    for _ in range(3):
        landlord.park(resident.peer, resident.known)
        scored = tenant.score(resident.backend, REQUEST)
        landlord.answer_want(resident.peer, resident.known)
        landlord.hear_copies(resident.peer, resident.known)
        np.testing.assert_array_equal(scored.result(WAIT_S).scores, before.scores)
    assert resident.backend.weights.addresses == addresses


def test_unparked_without_a_request_the_weights_are_there_for_the_next_one(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    from kernels.ipc.messages import Region

    landlord.park(resident.peer, resident.known)
    fd = resident.known.give()
    resident.peer.say(Region(resident.known.generation, False, None), fd)
    landlord.hear_copies(resident.peer, resident.known)
    assert tenant.score(resident.backend, REQUEST).result(WAIT_S).memory_s < 1.0
    assert resident.peer.is_silent()


def test_running_pass_finishes_before_its_memory_is_given_back(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    before = tenant.score(resident.backend, REQUEST).result(WAIT_S)
    held = HeldPass()
    scored = tenant.score(resident.backend, REQUEST, held)
    assert held.reached.wait(WAIT_S)
    resident.peer.say(Quiesce(resident.known.generation, WAIT_S))
    assert resident.peer.is_silent()
    assert resident.place.residency.phase is Phase.LEAVING
    held.go_on.set()
    assert resident.peer.hear(Unmapped).generation == resident.known.generation
    assert resident.known.take_back() == resident.known.size_bytes
    np.testing.assert_array_equal(scored.result(WAIT_S).scores, before.scores)


def test_request_behind_a_pass_that_is_asked_to_leave_waits_for_memory(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    held = HeldPass()
    first = tenant.score(resident.backend, REQUEST, held)
    assert held.reached.wait(WAIT_S)
    resident.peer.say(Quiesce(resident.known.generation, WAIT_S))
    assert resident.peer.is_silent()  # the request was read
    second = tenant.score(resident.backend, REQUEST)
    held.go_on.set()
    resident.peer.hear(Unmapped)  # before any WANT
    resident.known.take_back()
    landlord.answer_want(resident.peer, resident.known)
    landlord.hear_copies(resident.peer, resident.known)
    np.testing.assert_array_equal(first.result(WAIT_S).scores, second.result(WAIT_S).scores)


def test_stopped_pass_gives_its_memory_back_too(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    held = HeldPass()
    scored = tenant.score(resident.backend, REQUEST, held)
    assert held.reached.wait(WAIT_S)
    resident.peer.say(Quiesce(resident.known.generation, WAIT_S))
    assert resident.peer.is_silent()
    tenant.stop.set()
    held.go_on.set()
    resident.peer.hear(Unmapped)
    with pytest.raises(Cancelled):
        scored.result(WAIT_S)
    assert resident.known.take_back() == resident.known.size_bytes


def test_asked_twice_it_answers_twice(landlord: ScriptedLandlord, resident: Registered) -> None:
    landlord.park(resident.peer, resident.known)
    resident.peer.say(Quiesce(resident.known.generation, WAIT_S))
    assert resident.peer.hear(Unmapped).workspace_bytes == 0
    assert resident.place.residency.phase is Phase.PARKED


def test_quiesce_of_a_generation_that_is_over_is_ignored(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    landlord.park(resident.peer, resident.known)
    scored = tenant.score(resident.backend, REQUEST)
    landlord.answer_want(resident.peer, resident.known)
    landlord.hear_copies(resident.peer, resident.known)
    resident.peer.say(Quiesce(resident.known.generation - 1, WAIT_S))
    scored.result(WAIT_S)
    assert resident.peer.is_silent()
    assert resident.place.residency.phase is Phase.RESIDENT


def test_stop_ends_the_wait_for_memory(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    landlord.park(resident.peer, resident.known)
    scored = tenant.score(resident.backend, REQUEST)
    resident.peer.hear(Want)
    tenant.stop.set()
    with pytest.raises(Cancelled):
        scored.result(WAIT_S)
    resident.place.residency.idle()
    resident.peer.hear(Idle)
    # The next request asks anew: the landlord may have forgotten the first one's wish.
    tenant.stop.clear()
    again = tenant.score(resident.backend, REQUEST)
    resident.peer.hear(Want)
    tenant.stop.set()
    with pytest.raises(Cancelled):
        again.result(WAIT_S)


def test_idleness_is_told_once_after_every_pass(tenant: Tenant, resident: Registered) -> None:
    residency = resident.place.residency
    residency.idle()  # it became resident
    resident.peer.hear(Idle)
    residency.idle()
    assert resident.peer.is_silent()
    tenant.score(resident.backend, REQUEST).result(WAIT_S)
    residency.idle()
    resident.peer.hear(Idle)


def test_pass_pauses_while_the_target_decodes(
    landlord: ScriptedLandlord, folder: Path, path: Path
) -> None:
    paced = Tenant(landlord.path, EmulatedDevice(), pace_work_ms=0.0, pace_pause_ms=1.0)
    try:
        resident = landlord.register(paced, path)
        pacer = resident.backend.pacer
        before = paced.score(resident.backend, REQUEST).result(WAIT_S)
        assert pacer is not None and pacer.paused_s == 0.0
        resident.peer.say(State(True))
        landlord.park(resident.peer, resident.known)  # what was said before was heard
        scored = paced.score(resident.backend, REQUEST)
        landlord.answer_want(resident.peer, resident.known)
        landlord.hear_copies(resident.peer, resident.known)
        np.testing.assert_array_equal(scored.result(WAIT_S).scores, before.scores)
        assert pacer.paused_s >= 0.002  # between three layers
    finally:
        paced.close()


# ---- another model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("other"), "qwen2", layers=2, seed=5)


def swap(tenant: Tenant, resident: Registered, other: Path) -> tuple[Registered, Hello]:
    """Say HELLO for another model on the same socket."""
    backend, place = tenant.open(other, "other")
    taken = tenant.take(place)
    hello = resident.peer.hear(Hello)
    return Registered(resident.peer, resident.known, backend, place, taken), hello


def test_swap_unmaps_the_old_model_and_fills_the_new_one_on_the_same_socket(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered, other: Path
) -> None:
    new, hello = swap(tenant, resident, other)
    assert resident.known.take_back() == resident.known.size_bytes
    assert hello.model == "other"
    landlord.fill(new.peer, hello)
    new.taken.result(WAIT_S)
    assert tenant.score(new.backend, REQUEST).result(WAIT_S).layers_run == 2
    assert resident.place.residency.phase is Phase.LOST


def test_swap_back_reads_no_file(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered, other: Path, tmp_path: Path
) -> None:
    before = tenant.score(resident.backend, REQUEST).result(WAIT_S)
    new, hello = swap(tenant, resident, other)
    resident.known.take_back()
    landlord.fill(new.peer, hello)
    new.taken.result(WAIT_S)
    copied = tmp_path / "copy.gguf"
    copied.write_bytes(resident.path.read_bytes())
    back, hello = swap(tenant, new, copied)
    copied.unlink()
    assert hello.model_digest == resident.hello.model_digest
    landlord.hand_over(back.peer, resident.known, loaded=False)
    landlord.hear_copies(back.peer, resident.known)
    back.taken.result(WAIT_S)
    again = tenant.score(back.backend, REQUEST).result(WAIT_S)
    np.testing.assert_array_equal(again.scores, before.scores)


def test_what_crossed_a_swap_is_ignored_and_leaves_no_descriptor(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered, other: Path
) -> None:
    from kernels.ipc.messages import Region

    new, hello = swap(tenant, resident, other)
    # The landlord had said these when it had not read HELLO yet.
    resident.peer.say(Quiesce(resident.known.generation, WAIT_S))
    resident.peer.say(
        Region(resident.known.generation, False, None), resident.known.region.export()
    )
    landlord.fill(new.peer, hello)
    new.taken.result(WAIT_S)
    assert resident.known.take_back() == resident.known.size_bytes
    assert tenant.score(new.backend, REQUEST).result(WAIT_S).layers_run == 2


def test_idleness_is_not_told_between_a_hello_and_its_answer(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered, other: Path
) -> None:
    """A landlord takes nothing but HELLO from a tenant that has no place."""
    new, hello = swap(tenant, resident, other)
    resident.place.residency.idle()
    new.place.residency.idle()
    assert new.peer.is_silent()
    landlord.fill(new.peer, hello)


def test_a_hundred_parks_leak_no_descriptor_and_no_byte(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    def cycle(peer: Peer, known: Known) -> None:
        from kernels.ipc.messages import Region

        _, freed = landlord.park(peer, known)
        assert freed == known.size_bytes
        fd = known.give()
        peer.say(Region(known.generation, False, None), fd)
        landlord.hear_copies(peer, known)

    cycle(resident.peer, resident.known)
    before = open_descriptors()
    for _ in range(100):
        cycle(resident.peer, resident.known)
    assert len(open_descriptors()) == len(before)
    assert landlord.physical.used_bytes() == resident.known.size_bytes
