"""Landlord and tenant as two real processes: peers that hang, lie or ask twice; many cycles."""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.cuda_backend import model
from tests.ipc.household import NAME, TOTAL_MIB, WAIT_S, Household, freeze, thaw
from tests.tools import require_tool

CYCLES = 1_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_tool("g++")
    return model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def house(folder: Path, path: Path) -> Iterator[Household]:
    with Household(folder, path) as made:
        yield made


def test_tenant_that_hangs_loses_its_lease_and_returns_when_it_lives_again(
    house: Household,
) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    freeze(tenant)
    short = house.park(timeout_s=0.2).result(WAIT_S)
    assert short["refused"] == "PARK_SHORT"  # it has the memory mapped still, and we say so
    assert house.until("FAILED")["lease_pid"] == 0
    thaw(tenant)
    house.landlord.call("until_leased", name=NAME, pid=tenant.pid)
    assert house.used_bytes() == 0  # it let go before it registered again
    assert tenant.call("content") == content
    assert house.used_bytes() == house.until("RESIDENT")["size_bytes"]


def test_tenant_that_hangs_and_is_killed_gives_its_bytes_back(house: Household) -> None:
    tenant = house.resident()
    freeze(tenant)
    assert house.park(timeout_s=0.2).result(WAIT_S)["refused"] == "PARK_SHORT"
    tenant.kill()
    report = house.park().result(WAIT_S)
    assert report["freed_bytes"] == report["info"]["size_bytes"] and house.used_bytes() == 0


def test_region_parked_twice_is_parked_once(house: Household) -> None:
    tenant = house.resident()
    tenant.call("shut", gate="launch")
    tenant.start("score")
    tenant.event("stopped")
    first = house.park()
    house.until("PARKING")
    second = house.park()
    tenant.call("open", gate="launch")
    reports = [first.result(WAIT_S), second.result(WAIT_S)]
    reports.append(house.park().result(WAIT_S))
    assert len({report["info"]["generation"] for report in reports}) == 1
    assert [report["already_parked"] for report in reports] == [False, False, True]


def test_unpark_while_parking_follows_the_park(house: Household) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    tenant.call("shut", gate="launch")
    tenant.start("score")
    tenant.event("stopped")
    begun = house.until("RESIDENT")["generation"]
    parking = house.park()
    house.until("PARKING")
    unparking = house.unpark()
    tenant.call("open", gate="launch")
    assert parking.result(WAIT_S)["freed_bytes"] > 0
    after = unparking.result(WAIT_S)
    assert (after["state"], after["generation"]) == ("RESIDENT", begun + 2)
    assert tenant.call("content") == content


def test_generation_that_was_never_there_is_refused_and_nothing_moves(house: Household) -> None:
    house.resident()
    before = house.until("RESIDENT")
    for asked in (house.park(generation=99), house.unpark(generation=99)):
        assert asked.result(WAIT_S)["refused"] == "GENERATION_MISMATCH"
    assert house.until("RESIDENT") == before


def test_unpark_without_room_is_refused_and_works_once_there_is_some(house: Household) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    taken = house.landlord.call("take_room", num_bytes=TOTAL_MIB << 20)
    assert taken == [NAME]
    house.until("PARKED")
    assert house.unpark().result(WAIT_S)["refused"] == "NO_ROOM"
    scoring = tenant.start("content")  # waits for the memory
    house.landlord.call("leave_room")
    assert scoring.result(WAIT_S) == content


FORGED = [
    b"",
    b"\x00",
    struct.pack("<I", 0),
    struct.pack("<I", 1 << 30),
    struct.pack("<I", 1000) + b"{",  # and then the end
    struct.pack("<I", 4) + b"\xff\xfe\xfd\xfc",
    *(
        struct.pack("<I", len(body)) + body
        for body in (
            b'{"type": "PARK"}',
            b'{"type": "UNMAPPED", "generation": 1, "workspace_bytes": 0}',
            b'{"type": "REGION", "generation": 1, "loaded": true, "tensors": null}',
            json.dumps({"type": "WANT", "more": 1}).encode(),
        )
    ),
]


def test_short_and_forged_messages_touch_nobody_elses_lease(house: Household) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    before, fds = house.until("RESIDENT"), house.landlord.call("fds")
    for frame in FORGED:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as forger:
            forger.settimeout(WAIT_S)
            forger.connect(str(house.socket))
            # A descriptor that nobody asked for, with the first byte: it must not be kept.
            if frame:
                socket.send_fds(forger, [frame], [forger.fileno()])
            forger.shutdown(socket.SHUT_WR)
            while forger.recv(4096):
                pass
    assert house.until("RESIDENT") == before
    assert tenant.call("content") == content
    assert house.landlord.call("fds") == fds


@pytest.mark.parametrize("transport", ["vmm_fd", "legacy_ipc"])
def test_scores_are_the_same_after_memory_went_and_came(
    folder: Path, path: Path, transport: str
) -> None:
    """By handle the memory comes to other addresses each time, and the weights with it."""
    with Household(folder, path, transport) as house:
        tenant = house.resident()
        assert house.until("RESIDENT")["transport"] == transport
        scores = tenant.call("score")
        for _ in range(2):
            house.park().result(WAIT_S)
            assert house.used_bytes() == 0
            assert tenant.call("score") == scores


def test_a_thousand_cycles_lose_no_byte_no_descriptor_and_no_time(house: Household) -> None:
    tenant = house.resident()
    content = tenant.call("content")
    house.landlord.call("cycle", name=NAME, times=10)
    before = tenant.call("state")["fds"], house.landlord.call("fds"), house.used_bytes()
    done = house.landlord.call("cycle", name=NAME, times=CYCLES, timeout_s=100.0)
    after = tenant.call("state")["fds"], house.landlord.call("fds"), house.used_bytes()
    assert after == before
    assert done["freed_bytes"] == house.until("RESIDENT")["size_bytes"]
    early, late = done["seconds"][: CYCLES // 4], done["seconds"][-CYCLES // 4 :]
    # Something that grew with each cycle would show in all late ones; other load does not halve.
    assert statistics.median(late) < 3.0 * statistics.median(early) + 0.02
    assert tenant.call("content") == content
    assert len(os.listdir(house.socket.parent)) == 2  # the socket, and one region's memory
