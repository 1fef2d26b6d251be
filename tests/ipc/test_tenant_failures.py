"""What goes wrong around a lease: landlords that die, refuse or talk nonsense; failing drafters."""

from __future__ import annotations

import contextlib
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drafter_svc.backend import ScoreInput
from drafter_svc.residency import Phase
from kernels.errors import PeerGone
from kernels.ipc.messages import (
    Fill,
    Filled,
    Hello,
    Quiesce,
    Ready,
    Refused,
    Region,
    State,
    Tensor,
    Unmapped,
    Want,
)
from skim.errors import ConfigError, EngineFault, ModelFileError, SkimError, Unavailable
from tests.fixtures.cuda_backend import model, prompt
from tests.fixtures.landlord import WAIT_S, Peer, Registered, ScriptedLandlord, Tenant
from tests.ipc.test_tenant_park import HeldPass

REQUEST = ScoreInput(prompt(130, seed=1))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture
def resident(landlord: ScriptedLandlord, tenant: Tenant, path: Path) -> Registered:
    return landlord.register(tenant, path)


# ---- the landlord dies ---------------------------------------------------------------


def test_landlord_that_returns_is_given_the_image_again_without_the_file(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copy.gguf"
    copied.write_bytes(path.read_bytes())
    resident = landlord.register(tenant, copied)
    before = tenant.score(resident.backend, REQUEST).result(WAIT_S)
    checksum = resident.known.image_checksum()
    copied.unlink()
    landlord.die()
    landlord.rise()
    peer = landlord.accept()
    known = landlord.fill(peer, peer.hear(Hello))
    assert known.image_checksum() == checksum
    again = tenant.score(resident.backend, REQUEST).result(WAIT_S)
    np.testing.assert_array_equal(again.scores, before.scores)


def test_pass_that_runs_when_the_landlord_dies_finishes_and_only_then_it_registers_again(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    before = tenant.score(resident.backend, REQUEST).result(WAIT_S)
    held = HeldPass()
    scored = tenant.score(resident.backend, REQUEST, held)
    assert held.reached.wait(WAIT_S)
    landlord.die()
    landlord.rise()
    landlord.set_timeout(0.05)
    with pytest.raises(TimeoutError):
        landlord.accept()
    landlord.set_timeout(WAIT_S)
    assert landlord.physical.used_bytes() > 0  # the old region is still mapped
    held.go_on.set()
    np.testing.assert_array_equal(scored.result(WAIT_S).scores, before.scores)
    peer = landlord.accept()
    hello = peer.hear(Hello)
    assert landlord.physical.used_bytes() == 0
    landlord.fill(peer, hello)


def test_request_that_waited_for_the_dead_landlord_is_served_by_the_next(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    landlord.park(resident.peer, resident.known)
    scored = tenant.score(resident.backend, REQUEST)
    resident.peer.hear(Want)
    landlord.die()
    landlord.rise()
    peer = landlord.accept()
    landlord.fill(peer, peer.hear(Hello))
    assert scored.result(WAIT_S).scores.size == 5


def test_landlord_that_answers_but_has_no_room_yet_is_waited_for(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    """However long it takes: patience is for landlords that do not answer."""
    landlord.die()
    scored = tenant.score(resident.backend, REQUEST)
    landlord.rise()
    peer = landlord.accept()
    for _ in range(6):  # three times the tenant's patience
        peer.hear(Hello)
        peer.say(Refused("NO_ROOM", "a full context is in use", 0.1))
    landlord.fill(peer, peer.hear(Hello))
    assert scored.result(WAIT_S).scores.size == 5


def test_nobody_decodes_once_the_landlord_is_gone(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    resident.peer.say(State(True))
    landlord.park(resident.peer, resident.known)  # what was said before was heard
    assert tenant.plane.lease.decoding
    landlord.die()
    landlord.rise()
    landlord.accept().hear(Hello)
    assert not tenant.plane.lease.decoding


@pytest.mark.parametrize("after", ["hello", "fill", "filled"])
def test_landlord_that_dies_while_it_gives_memory_is_replaced(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path, after: str
) -> None:
    backend, place = tenant.open(path)
    taken = tenant.take(place)
    peer = landlord.accept()
    hello = peer.hear(Hello)
    if after != "hello":
        known = landlord.model(hello.size_bytes)
        peer.say(Fill(1), known.give(), known.image())
    if after == "filled":
        peer.hear(Filled)
    landlord.die()
    landlord.rise()
    peer = landlord.accept()
    landlord.fill(peer, peer.hear(Hello))
    taken.result(WAIT_S)
    assert tenant.score(backend, REQUEST).result(WAIT_S).scores.size == 5


def test_revoked_lease_is_let_go_and_asked_for_again(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    held = HeldPass()
    scored = tenant.score(resident.backend, REQUEST, held)
    assert held.reached.wait(WAIT_S)
    resident.peer.say(Quiesce(resident.known.generation, 0.01))
    resident.peer.close()  # the deadline passed
    held.go_on.set()
    scored.result(WAIT_S)
    peer = landlord.accept()
    peer.hear(Hello)
    assert resident.known.take_back() == resident.known.size_bytes
    landlord.answer_parked(peer, resident.known)
    scored = tenant.score(resident.backend, REQUEST)
    landlord.answer_want(peer, resident.known)
    landlord.hear_copies(peer, resident.known)
    scored.result(WAIT_S)


# ---- the landlord refuses ------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("GPU_MISMATCH", ConfigError),
        ("PEER_NOT_ALLOWED", ConfigError),
        ("NO_ROOM", ConfigError),
        ("BAD_MESSAGE", EngineFault),
    ],
)
def test_refusal_that_asking_again_does_not_mend_is_raised_with_its_words(
    landlord: ScriptedLandlord,
    tenant: Tenant,
    path: Path,
    reason: Any,
    error: type[SkimError],
) -> None:
    backend, place = tenant.open(path)
    taken = tenant.take(place)
    peer = landlord.accept()
    peer.hear(Hello)
    peer.say(Refused(reason, "the target is on GPU-7", None))
    with pytest.raises(error, match="the target is on GPU-7") as caught:
        taken.result(WAIT_S)
    assert caught.value.reason == reason
    with pytest.raises(Unavailable, match="the target is on GPU-7"):
        tenant.score(backend, REQUEST).result(WAIT_S)


def test_refused_drafter_asks_again_and_serves_when_it_is_taken(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    backend, place = tenant.open(path)
    taken = tenant.take(place)
    peer = landlord.accept()
    peer.hear(Hello)
    peer.say(Refused("PEER_NOT_ALLOWED", "not yet", None))
    with pytest.raises(ConfigError):
        taken.result(WAIT_S)
    peer = landlord.accept()
    landlord.fill(peer, peer.hear(Hello))
    assert tenant.score(backend, REQUEST).result(WAIT_S).scores.size == 5


@pytest.mark.parametrize("reason", ["REGION_BUSY", "NO_ROOM"])
def test_refusal_for_now_is_followed_by_another_hello(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path, reason: Any
) -> None:
    _, place = tenant.open(path)
    taken = tenant.take(place)
    peer = landlord.accept()
    peer.hear(Hello)
    for _ in range(2):
        peer.say(Refused(reason, "later", 0.01))
        hello = peer.hear(Hello)
    landlord.fill(peer, hello)
    taken.result(WAIT_S)


def test_checksum_that_the_landlord_does_not_find_is_a_fault(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    _, place = tenant.open(path)
    taken = tenant.take(place)
    peer = landlord.accept()
    known = landlord.model(peer.hear(Hello).size_bytes)
    peer.say(Fill(1), known.give(), known.image())
    peer.hear(Filled)
    peer.say(Refused("CHECKSUM_MISMATCH", "the image has another", None))
    with pytest.raises(EngineFault) as caught:
        taken.result(WAIT_S)
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    peer.until_gone()
    assert known.take_back() == known.size_bytes


def test_registration_that_is_not_answered_ends_at_its_time_limit(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    _, place = tenant.open(path)
    taken = tenant.take(place, 0.05)
    landlord.accept().hear(Hello)
    with pytest.raises(Unavailable):
        taken.result(WAIT_S)


# ---- the landlord talks nonsense -----------------------------------------------------


def end_of(peer: Peer) -> None:
    """The tenant hangs up."""
    with contextlib.suppress(PeerGone):
        while True:
            peer.channel.receive(WAIT_S)


def test_frame_that_is_not_of_the_protocol_ends_the_lease_and_lets_go(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    resident.peer.send_raw(struct.pack("<I", 8) + b"nonsense")
    end_of(resident.peer)
    assert resident.known.take_back() == resident.known.size_bytes
    peer = landlord.accept()
    peer.hear(Hello)
    landlord.answer_parked(peer, resident.known)


def test_message_of_a_tenant_ends_the_lease(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    resident.peer.say(Unmapped(1, 0))
    end_of(resident.peer)
    assert resident.known.take_back() == resident.known.size_bytes


@pytest.mark.parametrize("wrong", ["region", "image", "table"])
def test_region_of_another_shape_is_not_used_and_not_kept(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path, wrong: str
) -> None:
    backend, place = tenant.open(path)
    taken = tenant.take(place)
    peer = landlord.accept()
    size_bytes = peer.hear(Hello).size_bytes
    right, large = landlord.model(size_bytes), landlord.model(2 * size_bytes)
    tensors = tenant.tensors(backend)
    if wrong == "table":
        tensors = (*tensors[:-1], Tensor("another", "F32", (1,), 0))
    memory = large if wrong == "region" else right
    image = large if wrong == "image" else right
    peer.say(Region(1, True, tensors), memory.give(), image.image())
    with pytest.raises(EngineFault):
        taken.result(WAIT_S)
    end_of(peer)
    assert memory.take_back() == memory.size_bytes
    assert place.residency.phase is Phase.FAILED


def test_region_that_is_given_twice_is_ignored_the_second_time(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    landlord.hand_over(resident.peer, resident.known, loaded=True)
    resident.peer.say(Ready(resident.known.generation))
    landlord.park(resident.peer, resident.known)  # the second one's descriptors hold nothing


# ---- this side fails -----------------------------------------------------------------


def test_file_that_changed_since_it_was_opened_is_refused(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copy.gguf"
    copied.write_bytes(path.read_bytes())
    _, place = tenant.open(copied)
    (tmp_path / "new").mkdir()
    model(tmp_path / "new", layers=2, seed=9).replace(copied)
    taken = tenant.take(place)
    peer = landlord.accept()
    known = landlord.model(peer.hear(Hello).size_bytes)
    peer.say(Fill(1), known.give(), known.image())
    with pytest.raises(ModelFileError, match="changed"):
        taken.result(WAIT_S)
    end_of(peer)
    assert known.take_back() == known.size_bytes


def test_end_of_the_lease_lets_go_and_refuses_who_waits(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    _, place = tenant.open(path)
    taken = tenant.take(place, None)
    peer = landlord.accept()
    peer.hear(Hello)
    tenant.plane.end_lease()
    with pytest.raises(Unavailable):
        taken.result(WAIT_S)
    assert peer.until_gone() == []


def test_memory_is_let_go_when_the_drafter_ends(
    landlord: ScriptedLandlord, tenant: Tenant, resident: Registered
) -> None:
    tenant.plane.end_lease()
    resident.peer.until_gone()
    assert resident.known.take_back() == resident.known.size_bytes
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]
