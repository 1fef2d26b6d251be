"""Frames and descriptors over a real socket pair: blocking and asyncio ends."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from kernels.errors import PeerGone, ProtocolError
from kernels.ipc import channel as channel_module
from kernels.ipc.channel import AsyncChannel, Channel, close_fds
from kernels.ipc.messages import (
    MAX_FRAME_BYTES,
    Fill,
    Filled,
    Idle,
    Message,
    Parked,
    Refused,
    Region,
    Tensor,
    Want,
    encode,
)
from tests.tools import open_descriptors

LARGE = Filled(
    2, tuple(Tensor(f"layer.{i}.weight", "bf16", (64, 64), i) for i in range(9_000)), "ab"
)


def frame(message: Message) -> bytes:
    body = encode(message)
    return struct.pack("<I", len(body)) + body


def new_fd() -> int:
    return os.memfd_create("test")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ends = [Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)]
    yield ends[0], ends[1]
    for end in ends:
        end.close()


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


def test_messages_arrive_in_order_each_with_its_own_descriptors(
    pair: tuple[Channel, Channel],
) -> None:
    left, right = pair
    contents = [b"region", b"image", b"again"]
    fds = [new_fd() for _ in contents]
    for fd, content in zip(fds, contents, strict=True):
        os.write(fd, content)
    left.send(Want())
    left.send(Fill(1), fds[:2])
    left.send(Region(3, False, None), fds[2:])
    left.send(Idle())
    assert right.receive(1.0) == (Want(), [])
    message, first = right.receive(1.0)
    assert message == Fill(1) and [os.pread(fd, 9, 0) for fd in first] == contents[:2]
    message, second = right.receive(1.0)
    assert message == Region(3, False, None)
    assert [os.pread(fd, 9, 0) for fd in second] == contents[2:]
    assert right.receive(1.0) == (Idle(), [])
    assert all(not os.get_inheritable(fd) for fd in first + second)
    close_fds(first + second)


def test_what_is_sent_is_closed_here_at_once(pair: tuple[Channel, Channel]) -> None:
    fds = [new_fd(), new_fd()]
    pair[0].send(Fill(1), fds)
    assert not any(map(is_open, fds))
    close_fds(pair[1].receive(1.0)[1])


def test_what_cannot_be_sent_is_closed_too(pair: tuple[Channel, Channel]) -> None:
    fds = [new_fd(), new_fd()]
    pair[1].close()
    with pytest.raises(PeerGone):
        pair[0].send(Fill(1), fds)
    assert not any(map(is_open, fds))


def test_a_message_larger_than_a_frame_is_refused_where_it_is_made(
    pair: tuple[Channel, Channel],
) -> None:
    fd = new_fd()
    rows = tuple(Tensor(f"{i:0200}", "bf16", (1,), i) for i in range(MAX_FRAME_BYTES // 200))
    with pytest.raises(ProtocolError, match="bytes"):
        pair[0].send(Parked(2, rows), [fd])
    assert not is_open(fd)
    pair[0].send(Want())  # nothing of it was sent
    assert pair[1].receive(1.0) == (Want(), [])


def test_a_time_out_keeps_what_has_come_of_a_frame() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    end = Channel(ours)
    data, fd = frame(Region(3, False, None)), new_fd()
    socket.send_fds(theirs, [data[:10]], [fd])
    os.close(fd)
    with pytest.raises(TimeoutError):
        end.receive(0.01)
    theirs.sendall(data[10:])
    message, fds = end.receive(1.0)
    assert message == Region(3, False, None) and len(fds) == 1
    close_fds(fds)
    theirs.close()
    end.close()


def test_closing_closes_the_descriptors_of_half_a_frame() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    end = Channel(ours)
    read_end, write_end = os.pipe()
    socket.send_fds(theirs, [frame(Fill(1))[:10]], [write_end])
    os.close(write_end)
    with pytest.raises(TimeoutError):
        end.receive(0.01)
    end.close()
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    theirs.close()


@pytest.mark.parametrize(("message", "sent"), [(Fill(1), 1), (Fill(1), 0), (Want(), 1)])
def test_another_number_of_descriptors_is_refused_and_they_are_closed(
    message: Message, sent: int
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    end = Channel(ours)
    read_end, write_end = os.pipe()
    socket.send_fds(theirs, [frame(message)], [write_end] * sent)
    os.close(write_end)
    with pytest.raises(ProtocolError, match="file descriptors"):
        end.receive(1.0)
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    theirs.close()
    end.close()


@pytest.mark.parametrize("at_once", [2, 0], ids=["three", "two too late"])
def test_descriptors_beyond_the_frame_s_or_behind_its_begin_are_refused_and_closed(
    at_once: int,
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    end = Channel(ours)
    read_end, write_end = os.pipe()
    data = frame(Fill(1))
    if at_once:
        socket.send_fds(theirs, [data], [write_end] * 3)  # the kernel drops what has no place
    else:
        theirs.sendall(data[:6])
        socket.send_fds(theirs, [data[6:]], [write_end] * 2)
    os.close(write_end)
    with pytest.raises(ProtocolError, match="descriptors"):
        end.receive(1.0)
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    theirs.close()
    end.close()


def test_the_end_of_the_peer_is_told_after_what_it_said(pair: tuple[Channel, Channel]) -> None:
    pair[0].send(Refused("BAD_MESSAGE", "no", None))
    pair[0].close()
    assert pair[1].receive(1.0)[0] == Refused("BAD_MESSAGE", "no", None)
    with pytest.raises(PeerGone):
        pair[1].receive(1.0)


def test_shutting_down_wakes_the_thread_that_receives(pair: tuple[Channel, Channel]) -> None:
    raised: list[BaseException] = []

    def receive() -> None:
        try:
            pair[0].receive()
        except PeerGone as gone:
            raised.append(gone)

    thread = threading.Thread(target=receive)
    thread.start()
    pair[0].shutdown()
    thread.join(10.0)
    assert not thread.is_alive() and len(raised) == 1


def test_two_threads_send_whole_messages(pair: tuple[Channel, Channel]) -> None:
    senders = [
        threading.Thread(target=lambda: [pair[0].send(LARGE) for _ in range(3)]) for _ in range(2)
    ]
    for sender in senders:
        sender.start()
    assert [pair[1].receive(10.0)[0] for _ in range(6)] == [LARGE] * 6
    for sender in senders:
        sender.join()


def test_a_peer_that_takes_nothing_is_gone(
    pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "SEND_TIMEOUT_S", 0.02)
    with pytest.raises(PeerGone, match="takes nothing"):
        for _ in range(100):
            pair[0].send(LARGE)


async def test_the_asyncio_end_sends_as_the_peer_drains() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    left, right = AsyncChannel(ours), AsyncChannel(theirs)
    fds = [new_fd(), new_fd()]
    left.send(LARGE)
    left.send(Fill(1), fds)
    assert all(map(is_open, fds))  # behind the large one, which does not fit the socket
    message, first = await right.receive()
    assert message == LARGE
    message, second = await right.receive()
    assert message == Fill(1) and not any(
        fd in fds and is_open(fd) for fd in fds if fd not in second
    )
    close_fds(first + second)
    left.close()
    right.close()


async def test_a_peer_that_reads_nothing_is_given_up_and_its_descriptors_closed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    left = AsyncChannel(ours)
    read_end, write_end = os.pipe()
    for _ in range(8):  # of 370 KB each: more than the socket and 2 MiB
        left.send(LARGE, [os.dup(write_end)])
    os.close(write_end)
    assert left.closed
    with pytest.raises(PeerGone):
        await left.receive()
    theirs.close()
    assert os.read(read_end, 1) == b""
    os.close(read_end)


async def test_closing_the_asyncio_end_wakes_who_receives_and_drops_what_is_sent_after() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    left = AsyncChannel(ours)
    receiving = asyncio.create_task(left.receive())
    await asyncio.sleep(0)
    left.close()
    left.close()
    with pytest.raises(PeerGone):
        await receiving
    fd = new_fd()
    left.send(Region(3, False, None), [fd])
    assert not is_open(fd)
    theirs.close()


async def test_a_receive_that_is_cancelled_loses_nothing() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    left = AsyncChannel(ours)
    data = frame(Want())
    theirs.sendall(data[:6])
    receiving = asyncio.create_task(left.receive())
    await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.wait({receiving})
    theirs.sendall(data[6:])
    assert await left.receive() == (Want(), [])
    left.close()
    theirs.close()
