"""kill -9 of the tenant and of the landlord, two real processes, in every state of the region.

On a fake GPU, and with -m gpu on a real one. Each process is stopped in the state by a gate or by
the other's state, never by a clock. What must hold: no byte is lost, the weights are right
afterwards, and a region that the landlord knows is never read from disk again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.peer import Peer, PeerError
from tests.fixtures.cuda_backend import model
from tests.ipc.household import WAIT_S, Household
from tests.tools import require_gpu, require_tool


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def house(request: pytest.FixtureRequest, folder: Path, path: Path) -> Iterator[Household]:
    require_gpu() if request.param == "gpu" else require_tool("g++")
    with Household(folder, path, kind=request.param) as made:
        yield made


def successor(house: Household, content: str) -> Peer:
    """A new tenant that reads no weights from disk and has the same ones."""
    tenant = house.new_tenant()
    tenant.call("take")
    assert tenant.call("content") == content
    assert tenant.call("state")["file_reads"] == 0
    region = house.until("RESIDENT")
    assert region["lease_pid"] == tenant.pid
    house.check_used(region["size_bytes"])
    return tenant


# ---- the tenant dies ---------------------------------------------------------------------------


def test_tenant_killed_while_resident_leaves_loaded_weights_to_its_successor(
    house: Household,
) -> None:
    tenant = house.resident()
    content, scores = tenant.call("content"), tenant.call("score")
    before = house.until("RESIDENT")
    tenant.kill()
    after = successor(house, content)
    assert after.call("score") == scores
    assert house.until("RESIDENT")["generation"] == before["generation"]  # never moved


def test_tenant_killed_while_parking_gives_every_byte_back(house: Household) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    tenant.call("shut", gate="launch")
    tenant.start("score")
    tenant.event("stopped")
    parking = house.park()
    size_bytes = house.until("PARKING")["size_bytes"]
    assert not parking.done()  # it waits for the pass
    tenant.kill()
    report = parking.result(WAIT_S)
    # On a real GPU the context of the killed process may come free in the same moment.
    assert report["freed_bytes"] >= size_bytes
    house.check_used(0)
    house.until("PARKED")
    successor(house, content)


def test_tenant_killed_while_parked_leaves_its_image_to_its_successor(house: Household) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    house.park().result(WAIT_S)
    tenant.kill()
    house.check_used(0)
    successor(house, content)


def test_tenant_killed_half_way_through_an_unpark_leaves_the_copy_to_its_successor(
    house: Household,
) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    house.park().result(WAIT_S)
    tenant.call("shut", gate="copy")
    unparking = house.unpark()
    tenant.event("stopped")
    assert house.until("UNPARKING")["layers_ready"] <= 1
    tenant.kill()
    assert unparking.result(WAIT_S)["refused"] == "UNPARK_INTERRUPTED"
    successor(house, content)


def test_tenant_killed_while_it_fills_leaves_nothing(house: Household) -> None:
    tenant = house.new_tenant()
    tenant.call("shut", gate="fill")
    taking = tenant.start("take")
    tenant.event("stopped")
    assert house.used_bytes() > 0
    tenant.kill()
    with pytest.raises(PeerError):
        taking.result(WAIT_S)
    again = house.resident()
    assert again.call("state")["file_reads"] == 1
    house.check_used(house.until("RESIDENT")["size_bytes"])


# ---- the landlord dies -------------------------------------------------------------------------


def registered_again(house: Household, tenant: Peer, content: str) -> None:
    """A new landlord: the tenant let the old memory go and fills the new from its image."""
    house.new_landlord()  # no room for both: the tenant lets go before it registers
    region = house.until("RESIDENT")
    assert region["lease_pid"] == tenant.pid
    assert tenant.call("content") == content
    assert tenant.call("state")["file_reads"] == 1
    house.check_used(region["size_bytes"])


def test_landlord_killed_while_resident_is_noticed_and_replaced(house: Household) -> None:
    tenant = house.resident()
    content, scores = tenant.call("content"), tenant.call("score")
    house.landlord.kill()
    registered_again(house, tenant, content)
    assert tenant.call("score") == scores


def test_landlord_killed_while_parking_lets_the_pass_finish(house: Household) -> None:
    tenant = house.resident()
    content, scores = tenant.call("content"), tenant.call("score")
    tenant.call("shut", gate="launch")
    scoring = tenant.start("score")
    tenant.event("stopped")
    parking = house.park()
    house.until("PARKING")
    house.landlord.kill()
    with pytest.raises(PeerError):
        parking.result(WAIT_S)
    tenant.call("open", gate="launch")
    assert scoring.result(WAIT_S) == scores
    registered_again(house, tenant, content)


def test_landlord_killed_while_parked_is_replaced_from_the_tenants_image(house: Household) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    house.park().result(WAIT_S)
    house.landlord.kill()
    registered_again(house, tenant, content)


def test_landlord_killed_half_way_through_an_unpark_is_replaced(house: Household) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    house.park().result(WAIT_S)
    tenant.call("shut", gate="copy")
    house.unpark()
    tenant.event("stopped")
    house.landlord.kill()
    tenant.call("open", gate="copy")
    registered_again(house, tenant, content)


def test_landlord_killed_while_its_tenant_fills_is_replaced(house: Household) -> None:
    tenant = house.new_tenant()
    tenant.call("shut", gate="fill")
    taking = tenant.start("take")
    tenant.event("stopped")
    house.landlord.kill()
    tenant.call("open", gate="fill")
    house.new_landlord()
    taking.result(WAIT_S)
    region = house.until("RESIDENT")
    assert region["lease_pid"] == tenant.pid
    house.check_used(region["size_bytes"])
    assert len(tenant.call("content")) == 64
