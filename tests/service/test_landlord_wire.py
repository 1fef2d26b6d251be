"""The landlord's socket: who may connect, forged frames, messages out of turn, and its end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from kernels.errors import PeerGone
from kernels.ipc.messages import (
    Copied,
    Fill,
    Filled,
    Idle,
    Quiesce,
    Ready,
    Refused,
    Region,
    State,
    Tensor,
    Unmapped,
    Want,
)
from skim.errors import ConfigError
from target_svc.memory.landlord import Landlord
from target_svc.memory.listener import Listener
from target_svc.memory.settings import MemorySettings
from tests.fixtures.tenant import NAME, TENSORS, TIMEOUT_S, UNIT, hello, house
from tests.tools import open_descriptors

# Messages out of turn or out of range.


async def test_a_wrong_checksum_is_refused_and_the_region_forgotten(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        tenant.send(hello())
        await tenant.expect(Fill)
        tenant.send(Filled(1, TENSORS, hashlib.sha256(b"another").hexdigest()))
        assert (await tenant.expect(Refused)).reason == "CHECKSUM_MISMATCH"
        tenant.let_go()
        assert await tenant.closed()
        await home.no_region()


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (TENSORS[0], TENSORS[0]),
        (Tensor("far", "bf16", (1,), 4 * UNIT),),
    ],
)
async def test_a_tensor_table_that_cannot_be_is_refused(
    tmp_path: Path, tensors: tuple[Tensor, ...]
) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        tenant.send(hello())
        await tenant.expect(Fill)
        checksum = hashlib.sha256(bytes(4 * UNIT)).hexdigest()
        tenant.send(Filled(1, tensors, checksum))
        assert (await tenant.expect(Refused)).reason == "BAD_MESSAGE"


@pytest.mark.parametrize(
    "message", [Want(), Idle(), Unmapped(1, 0), Copied(1, 0, 0, False), Filled(1, TENSORS, "00")]
)
async def test_nothing_may_be_said_before_hello(tmp_path: Path, message: Any) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        tenant.send(message)
        assert (await tenant.expect(Refused)).reason == "BAD_MESSAGE"
        assert await tenant.closed()


@pytest.mark.parametrize(
    "message",
    [
        Unmapped(1, 0),  # nobody asked
        Unmapped(2, 0),  # a generation that was never given
        Copied(2, 0, 0, False),
        Copied(1, 4 * UNIT + 1, 0, False),  # more than there is
        Filled(1, TENSORS, "00"),  # filled already
        Quiesce(1, 1.0),  # the landlord's own
        Ready(1),
    ],
)
async def test_a_message_out_of_turn_ends_the_lease_and_keeps_the_region(
    tmp_path: Path, message: Any
) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        tenant.send(message)
        refused = await tenant.expect(Refused)
        assert (refused.reason, refused.retry_after_s) == ("BAD_MESSAGE", None)
        assert await tenant.closed()
        assert (await home.no_lease()).state == "RESIDENT"


async def test_messages_of_an_older_generation_are_ignored(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.parked()
        tenant.send(Want())
        await tenant.expect(Region)
        tenant.send(Copied(1, 4 * UNIT, 2, done=True))
        tenant.send(Unmapped(1, 0))
        tenant.send(Copied(3, UNIT, 1, done=False))
        async with asyncio.timeout(TIMEOUT_S):
            async for info in home.landlord.watch(NAME):
                assert info.state == "UNPARKING" and info.layers_ready < 2
                if info.copied_bytes == UNIT:
                    break


def frame(body: bytes, size: int | None = None) -> bytes:
    return struct.pack("<I", len(body) if size is None else size) + body


HELLO_JSON = {"type": "HELLO", **hello().__dict__}


@pytest.mark.parametrize(
    "data",
    [
        frame(b""),
        frame(b"x" * 8, size=(1 << 20) + 1),
        frame(b"\xff\xfe\xfd"),
        frame(b"[]"),
        frame(b"{"),
        frame(b"[" * 5_000 + b"]" * 5_000),
        frame(b'{"type":"WANT","type":"WANT"}'),
        frame(b'{"type":"BOGUS"}'),
        frame(b'{"type":["HELLO"]}'),
        frame(b'{"type":"WANT","more":1}'),
        frame(json.dumps({**HELLO_JSON, "pid": "1"}).encode()),
        frame(json.dumps({**HELLO_JSON, "pid": True}).encode()),
        frame(json.dumps({**HELLO_JSON, "size_bytes": -1}).encode()),
        frame(json.dumps({**HELLO_JSON, "model": "x" * 257}).encode()),
        frame(json.dumps({**HELLO_JSON, "model": "two\nlines"}).encode()),
        frame(json.dumps({k: v for k, v in HELLO_JSON.items() if k != "pid"}).encode()),
        frame(b'{"type":"COPIED","generation":NaN,"copied_bytes":0,"layers_ready":0,"done":true}'),
    ],
)
async def test_a_frame_that_is_not_of_the_protocol_ends_the_lease(
    tmp_path: Path, data: bytes
) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        tenant.channel._sock.sendall(data)
        assert (await tenant.expect(Refused)).reason == "BAD_MESSAGE"
        assert await tenant.closed()
        await home.filled()  # the landlord lives


@pytest.mark.parametrize("count", [1, 2, 3, 40])
async def test_descriptors_that_nobody_asked_for_are_refused_and_closed(
    tmp_path: Path, count: int
) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        read_end, write_end = os.pipe()
        data = frame(json.dumps(HELLO_JSON).encode())
        socket.send_fds(tenant.channel._sock, [data], [write_end] * count)
        os.close(write_end)
        assert (await tenant.expect(Refused)).reason == "BAD_MESSAGE"
        assert await tenant.closed()
        assert os.read(read_end, 1) == b""  # every copy of the other end is closed
        os.close(read_end)


async def test_descriptors_after_a_frame_s_first_bytes_are_refused_and_closed(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        read_end, write_end = os.pipe()
        data = frame(json.dumps(HELLO_JSON).encode())
        tenant.channel._sock.sendall(data[:10])
        socket.send_fds(tenant.channel._sock, [data[10:]], [write_end])
        os.close(write_end)
        assert (await tenant.expect(Refused)).reason == "BAD_MESSAGE"
        assert os.read(read_end, 1) == b""
        os.close(read_end)


async def test_half_a_frame_and_the_end_is_a_tenant_that_died(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        tenant.channel._sock.sendall(frame(b'{"type":"WANT"}')[:9])
        tenant.kill()
        assert (await home.no_lease()).state == "RESIDENT"


async def test_a_frame_in_single_bytes_is_a_frame(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.tenant()
        for byte in frame(json.dumps(HELLO_JSON).encode()):
            tenant.channel._sock.sendall(bytes([byte]))
            await asyncio.sleep(0)
        await tenant.expect(Fill)


# The state of the target, and its end.


async def test_tenants_hear_of_decoding_when_it_changes_and_when_they_attach(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as home:
        first = await home.filled()
        for decoding in (True, True, False, True):
            home.landlord.set_decoding(decoding)
        assert [await first.expect(State) for _ in range(3)] == [
            State(True),
            State(False),
            State(True),
        ]
        second = await home.tenant()
        second.send(hello("other"))
        await second.expect(Fill)
        assert await second.expect(State) == State(True)


async def test_a_landlord_that_ends_leaves_no_byte_no_descriptor_and_no_socket(
    tmp_path: Path,
) -> None:
    before = open_descriptors()
    async with house(tmp_path) as home:
        tenant = await home.filled()
        await home.landlord.close()
        with pytest.raises(PeerGone):
            await tenant.receive()
        tenant.kill()
        assert home.physical.used_bytes() == 0
        assert not home.path.exists()
    assert open_descriptors() <= before


async def test_a_landlord_ends_while_a_tenant_is_being_parked(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        tenant = await home.filled()
        parking = asyncio.create_task(home.landlord.park(NAME, timeout_s=60.0))
        await tenant.expect(Quiesce)
        await asyncio.wait_for(home.landlord.close(), TIMEOUT_S)
        await asyncio.wait({parking}, timeout=TIMEOUT_S)
        assert parking.done() and parking.exception() is not None  # the tenant still holds it


# The socket.


async def test_the_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        assert home.path.stat().st_mode & 0o777 == 0o600


async def test_where_other_users_may_connect_the_file_lets_them(tmp_path: Path) -> None:
    async with house(tmp_path, peer_uids=(4711,)) as home:
        assert home.path.stat().st_mode & 0o777 == 0o666


async def test_a_user_that_is_not_allowed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path) as home:
        monkeypatch.setattr(
            "target_svc.memory.listener.peer_credentials", lambda connection: (1, 4711)
        )
        tenant = await home.tenant()
        assert (await tenant.expect(Refused)).reason == "PEER_NOT_ALLOWED"
        assert await tenant.closed()


async def test_a_socket_file_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "memory.sock"))
    async with house(tmp_path) as home:
        await home.filled()


async def test_a_living_landlord_s_socket_is_refused_and_left_alone(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        second = Landlord(home.physical, MemorySettings(home.path))
        with pytest.raises(ConfigError, match="another landlord"):
            await second.start()
        await second.close()
        await home.filled()


async def test_another_file_of_the_socket_s_name_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "memory.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="another file"):
        Listener(path, (), lambda *_: None).start()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("path", ["missing/memory.sock", "x" * 120])
async def test_a_path_that_cannot_be_a_socket_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="memory socket"):
        Listener(tmp_path / path, (), lambda *_: None).start()
