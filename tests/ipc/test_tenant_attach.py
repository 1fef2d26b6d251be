"""A drafter comes to memory: it fills a region, finds one filled, copies one, waits for one.

The landlord is scripted, the socket, the lease and the kernels (on the emulated device) are real.
Weights that were copied, mapped or filled give the scores of an ordinary backend, bit for bit.
"""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from drafter_svc.backend import WAITING_FOR_MEMORY, AttentionConfig, ChunkScores, ScoreInput
from drafter_svc.cuda_backend import CudaBackend
from drafter_svc.residency import Phase
from kernels.device import Mark, Pinned
from kernels.ipc.messages import Copied, Hello, Want
from skim.errors import PromptTooLong, Unavailable
from tests.emulator.device import EmulatedDevice
from tests.fixtures.cuda_backend import model, prompt, run
from tests.fixtures.landlord import WAIT_S, Known, Peer, ScriptedLandlord, Tenant
from tests.fixtures.leased_drafter import HeldDevice

REQUEST = ScoreInput(prompt(130, seed=1))
LAYERS = 3


@cache
def ordinary(path: Path) -> ChunkScores:
    """The scores of a backend whose weights are its own."""
    backend = CudaBackend.open(path, EmulatedDevice())
    scores = run(backend, REQUEST)
    backend.close()
    return scores


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model"), layers=LAYERS)


def assert_equal(scores: ChunkScores, path: Path) -> None:
    np.testing.assert_array_equal(scores.scores, ordinary(path).scores)
    assert scores.panel is not None and ordinary(path).panel is not None
    np.testing.assert_array_equal(scores.panel, ordinary(path).panel)


def known_model(landlord: ScriptedLandlord, path: Path) -> Known:
    """What a drafter that is gone left with the landlord: the image, its table, the region."""
    before = Tenant(landlord.path, EmulatedDevice())
    _, place = before.open(path)
    taken = before.take(place)
    peer = landlord.accept()
    known = landlord.fill(peer, peer.hear(Hello))
    taken.result(WAIT_S)
    before.close()
    peer.until_gone()
    return known


def unreadable(path: Path, tmp_path: Path) -> Path:
    """A copy of the model that has been opened and is then cut off behind its description."""
    copied = tmp_path / "copy.gguf"
    copied.write_bytes(path.read_bytes())
    return copied


def test_unknown_model_is_filled_from_its_file(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    backend, place = tenant.open(path)
    taken = tenant.take(place)
    peer = landlord.accept()
    hello = peer.hear(Hello)
    known = landlord.fill(peer, hello)
    taken.result(WAIT_S)
    assert hello.gpu_uuid == landlord.physical.uuid and hello.model == "tiny"
    assert known.size_bytes == backend.model.weight_bytes
    assert [row.offset for row in known.tensors] == [
        placed.offset for placed in backend.weights.layout.tensors
    ]
    assert place.residency.phase is Phase.RESIDENT
    assert_equal(tenant.score(backend, REQUEST).result(WAIT_S), path)


def test_nothing_is_scored_before_the_landlord_has_checked_what_was_filled(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    from kernels.ipc.messages import Fill, Filled, Ready

    backend, place = tenant.open(path)
    tenant.take(place)
    peer = landlord.accept()
    known = landlord.model(peer.hear(Hello).size_bytes)
    peer.say(Fill(1), known.give(), known.image())
    peer.hear(Filled)
    waits = threading.Event()
    scored = tenant.score(backend, REQUEST, lambda done, total: waits.set())
    assert waits.wait(WAIT_S) and not scored.done()
    assert place.residency.phase is Phase.ARRIVING
    peer.say(Ready(1))
    assert_equal(scored.result(WAIT_S), path)


def test_resident_region_is_scored_without_the_file(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path, tmp_path: Path
) -> None:
    known, copied = known_model(landlord, path), unreadable(path, tmp_path)
    backend, place = tenant.open(copied)
    copied.unlink()
    taken = tenant.take(place)
    peer = landlord.accept()
    peer.hear(Hello)
    landlord.hand_over(peer, known, loaded=True)
    taken.result(WAIT_S)
    assert_equal(tenant.score(backend, REQUEST).result(WAIT_S), path)
    assert peer.is_silent()


def test_region_that_a_predecessor_left_half_copied_is_copied_from_the_image(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path, tmp_path: Path
) -> None:
    known, copied = known_model(landlord, path), unreadable(path, tmp_path)
    known.take_back()  # new memory holds zeros
    backend, place = tenant.open(copied)
    copied.unlink()
    taken = tenant.take(place)
    peer = landlord.accept()
    peer.hear(Hello)
    landlord.hand_over(peer, known, loaded=False)
    heard = landlord.hear_copies(peer, known)
    taken.result(WAIT_S)
    ends = [backend.weights.layout.end_of_layer(layer) for layer in range(LAYERS)]
    assert [copy.copied_bytes for copy in heard] == ends
    assert [copy.layers_ready for copy in heard] == [1, 2, 3]
    assert [copy.done for copy in heard] == [False, False, True]
    assert_equal(tenant.score(backend, REQUEST).result(WAIT_S), path)


def parked(landlord: ScriptedLandlord, tenant: Tenant, path: Path) -> tuple[CudaBackend, Peer]:
    """A drafter that is registered and has no memory; the model is the landlord's first."""
    known = known_model(landlord, path)
    known.take_back()
    backend, place = tenant.open(path)
    taken = tenant.take(place)
    peer = landlord.accept()
    peer.hear(Hello)
    landlord.answer_parked(peer, known)
    taken.result(WAIT_S)
    assert place.residency.phase is Phase.PARKED
    return backend, peer


def test_parked_drafter_asks_for_memory_when_a_request_waits(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    backend, peer = parked(landlord, tenant, path)
    known = landlord.known[0]
    assert peer.is_silent()
    told: list[tuple[int, int]] = []
    scored = tenant.score(backend, REQUEST, lambda done, total: told.append((done, total)))
    landlord.answer_want(peer, known)
    assert landlord.hear_copies(peer, known)[-1].done
    result = scored.result(WAIT_S)
    assert_equal(result, path)
    assert told == [(WAITING_FOR_MEMORY, 3), (0, 3), (1, 3), (2, 3), (3, 3)]
    assert result.memory_s > 0.0
    assert known.region is not None and landlord.physical.used_bytes() == known.size_bytes


def test_request_that_reads_text_alone_needs_no_memory(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    backend, peer = parked(landlord, tenant, path)
    lexical = ScoreInput(REQUEST.ids, scorer="lexical")
    assert tenant.score(backend, lexical).result(WAIT_S).scores.size == 5
    assert peer.is_silent()


class LateDevice(EmulatedDevice):
    """Copies of the image arrive when the test opens their gate, layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = [threading.Event() for _ in range(LAYERS)]
        self.awaited = [threading.Event() for _ in range(LAYERS)]
        self._queued = 0

    def copy_in(
        self,
        address: int,
        pinned: Pinned,
        offset: int,
        num_bytes: int,
        *,
        after: Mark | None = None,
    ) -> Mark:
        mark = super().copy_in(address, pinned, offset, num_bytes, after=after)
        layer, self._queued = self._queued, self._queued + 1
        return _LateMark(self, layer, mark)

    def wait_for(self, mark: Mark) -> None:
        assert isinstance(mark, _LateMark)
        self.awaited[mark.layer].set()
        super().wait_for(mark)


class _LateMark:
    def __init__(self, device: LateDevice, layer: int, mark: Mark) -> None:
        self._device, self.layer, self._mark = device, layer, mark

    def wait(self) -> None:
        assert self._device.gates[self.layer].wait(WAIT_S)
        self._mark.wait()

    def seconds_since(self, earlier: Mark) -> float:
        return self._mark.seconds_since(earlier)


def test_first_layer_is_scored_while_the_others_are_copied(
    landlord: ScriptedLandlord, path: Path
) -> None:
    device = LateDevice()
    late = Tenant(landlord.path, device)
    try:
        backend, peer = parked(landlord, late, path)
        began = threading.Event()
        scored = late.score(backend, REQUEST, lambda done, total: done == 0 and began.set())
        landlord.answer_want(peer, landlord.known[0])
        assert began.wait(WAIT_S)  # before a byte has arrived
        device.gates[0].set()
        assert device.awaited[1].wait(WAIT_S)  # the first layer is queued, the second awaited
        assert peer.hear(Copied).layers_ready == 1
        assert peer.is_silent() and not scored.done()
        for gate in device.gates:
            gate.set()
        assert peer.hear(Copied).layers_ready == 2
        assert peer.hear(Copied).done
        assert_equal(scored.result(WAIT_S), path)
    finally:
        late.close()


def test_without_a_landlord_requests_are_refused_after_a_while(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    landlord.die()
    backend, _ = tenant.open(path)
    with pytest.raises(Unavailable) as caught:
        tenant.score(backend, REQUEST).result(WAIT_S)
    assert caught.value.reason == "MEMORY_PLANE_LOST"
    assert caught.value.retry_after_s


def test_drafter_waits_for_a_landlord_that_comes_later(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    landlord.die()
    backend, place = tenant.open(path)
    taken = tenant.take(place)
    landlord.rise()
    peer = landlord.accept()
    landlord.fill(peer, peer.hear(Hello))
    taken.result(WAIT_S)
    assert_equal(tenant.score(backend, REQUEST).result(WAIT_S), path)


def test_landlord_without_room_for_a_waiting_request_is_asked_again(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path
) -> None:
    from kernels.ipc.messages import Refused

    backend, peer = parked(landlord, tenant, path)
    scored = tenant.score(backend, REQUEST)
    for _ in range(2):
        peer.hear(Want)
        peer.say(Refused("NO_ROOM", "a full context is in use", 0.01))
    landlord.answer_want(peer, landlord.known[0])
    assert_equal(scored.result(WAIT_S), path)


def test_prompt_that_is_too_long_is_refused_without_asking_for_memory(
    landlord: ScriptedLandlord, tenant: Tenant, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, peer = parked(landlord, tenant, path)
    monkeypatch.setattr("drafter_svc.cuda_backend.most_sparse_rows", lambda arch, head_dim: 100)
    long = ScoreInput(REQUEST.ids, attention=AttentionConfig(dense_below_tokens=0))
    with pytest.raises(PromptTooLong):
        tenant.score(backend, long).result(WAIT_S)
    assert peer.is_silent()


def test_kernels_are_warm_when_the_model_has_its_place(
    landlord: ScriptedLandlord, path: Path
) -> None:
    known, device = known_model(landlord, path), HeldDevice()
    warm = Tenant(landlord.path, device, warm_up_tokens=130)
    try:
        _, place = warm.open(path)
        taken = warm.take(place)
        peer = landlord.accept()
        peer.hear(Hello)
        landlord.hand_over(peer, known, loaded=True)
        taken.result(WAIT_S)
        assert device.launched.is_set()
        assert device.free_bytes() == device.total_bytes - known.size_bytes
    finally:
        warm.close()


def test_without_room_to_warm_up_the_model_serves_all_the_same(
    landlord: ScriptedLandlord, path: Path
) -> None:
    known = known_model(landlord, path)
    tight = Tenant(
        landlord.path, EmulatedDevice(total_bytes=known.size_bytes + 4096), warm_up_tokens=130
    )
    try:
        _, place = tight.open(path)
        taken = tight.take(place)
        peer = landlord.accept()
        peer.hear(Hello)
        landlord.hand_over(peer, known, loaded=True)
        taken.result(WAIT_S)
        assert place.residency.phase is Phase.RESIDENT
    finally:
        tight.close()
