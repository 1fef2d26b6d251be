"""What breaks: the engine child, its model file, its parent, the frames between them."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from skim.errors import ConfigError, EngineFault, ModelFileError, SkimError, Unavailable
from target_svc.engine_client import EngineClient
from target_svc.engine_stream import error_from
from target_svc.frames import encode
from target_svc.messages import Cancel, Open, Submit, Tokens
from tests.fixtures.engine import (
    ENDLESS_TOKENS,
    collect,
    endless,
    random_ids,
    running_engine,
    tiny_config,
    tiny_model,
)

ROOT = Path(__file__).resolve().parents[2]
PROMPT = random_ids(100)


def wait_for_exit(pid: int, timeout_s: float = 10.0) -> None:
    """Wait until a process that may not be our child is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], timeout_s)[0], f"{pid} still runs"
    finally:
        os.close(descriptor)


async def test_kill_in_the_middle_fails_that_request_and_the_next_one_works() -> None:
    async with running_engine(gen_max=ENDLESS_TOKENS) as engine:
        stream = await engine.submit(endless("a", PROMPT))
        async for event in stream:
            if isinstance(event, Tokens):
                break
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(Unavailable) as caught:
            await collect(stream)
        assert caught.value.reason == "ENGINE_RESTARTED" and caught.value.retry_after_s
        await engine.ready()
        assert len((await collect(await engine.submit(Submit("a", PROMPT, 3)))).ids) == 3
        assert engine.restarts == 1


async def test_kill_fails_waiting_requests_and_reservations_too() -> None:
    async with running_engine(gen_max=ENDLESS_TOKENS) as engine:
        await engine.reserve(1024, "f16")
        streams = [await engine.submit(endless(f"r{i}", PROMPT)) for i in range(3)]
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(Unavailable):
                await collect(stream)
        await engine.release()  # a dead child holds nothing: at once
        assert engine.full is None
        await engine.ready()
        await engine.reserve(1024, "f16")


async def test_release_on_its_way_to_an_engine_that_dies_returns() -> None:
    async with running_engine() as engine:
        await engine.reserve(1024, "f16")
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)
        release = asyncio.create_task(engine.release())
        await asyncio.sleep(0)  # let it send
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            await release


async def test_submit_while_the_engine_restarts_is_unavailable() -> None:
    async with running_engine(gen_max=ENDLESS_TOKENS) as engine:
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        stream = await engine.submit(endless("a", PROMPT))
        with pytest.raises(Unavailable):
            await collect(stream)
        with pytest.raises(Unavailable) as caught:
            await engine.submit(Submit("b", PROMPT, 3))
        assert caught.value.reason == "ENGINE_STARTING"


def broken_models(tmp_path: Path) -> list[Path]:
    whole = tiny_model().read_bytes()
    contents = {
        "weights.gguf": whole[: len(whole) * 9 // 10],
        "header.gguf": whole[:3000],
        "magic.gguf": whole[:3],
        "empty.gguf": b"",
        "other.gguf": b"PK\x03\x04" + whole[4:],
        "architecture.gguf": whole.replace(b"qwen3", b"qwenX"),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return [tmp_path / name for name in contents] + [tmp_path / "missing.gguf"]


async def test_broken_model_files_are_a_clear_error_and_no_crash_loop(tmp_path: Path) -> None:
    for path in broken_models(tmp_path):
        client = EngineClient(tiny_config(path), backoff_s=(0.01, 0.01))
        await client.start()
        try:
            with pytest.raises(ModelFileError, match=path.name):
                await client.ready()
            with pytest.raises(ModelFileError):
                await client.submit(Submit("a", PROMPT, 3))
            assert client.restarts == 0 and client.pid is None
        finally:
            await client.close()


@pytest.mark.parametrize(
    ("options", "field"),
    [({"kv_type": "q8_0", "flash_attention": False}, "flash"), ({"slots": 9}, "verify batch")],
)
async def test_settings_that_cannot_work_are_named(options: dict[str, Any], field: str) -> None:
    client = EngineClient(tiny_config(**options))
    await client.start()
    with pytest.raises(ConfigError, match=field):
        await client.ready()
    await client.close()


async def test_child_that_never_becomes_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    client = EngineClient(tiny_config(), backoff_s=(0.001, 0.001))
    await client.start()
    with pytest.raises(EngineFault, match="3 times"):
        await client.ready()
    await client.close()


async def test_child_that_speaks_no_frames_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    babbler = tmp_path / "babbler"
    script = "import os, sys, time; os.write(int(sys.argv[4]), b'x' * 64); time.sleep(60)"
    babbler.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}" "$@"\n')
    babbler.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(babbler))
    client = EngineClient(tiny_config(), backoff_s=(0.001, 0.001))
    await client.start()
    async with asyncio.timeout(20):
        with pytest.raises(EngineFault, match="3 times"):
            await client.ready()
    await client.close()


def start_child(connection: socket.socket) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "target_svc.llama", "--fd", str(connection.fileno())]
    return subprocess.Popen(
        [*command, "--parent-pid", str(os.getpid())],
        pass_fds=[connection.fileno()],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    "data",
    [b"\0" * 64, encode(Open(tiny_config()))[:-1], encode(Cancel("a"))],
    ids=["garbage", "cut short", "no Open"],
)
def test_child_leaves_when_it_is_not_spoken_to_properly(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = start_child(theirs)
        theirs.close()
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        assert child.wait(20) == 1


PARENT = """
import asyncio, sys
from target_svc.engine_client import EngineClient
from target_svc.messages import EngineConfig
async def main():
    client = EngineClient(EngineConfig(sys.argv[1], kept_max=256, gen_max=256, threads=1))
    await client.start()
    await client.ready()
    print(client.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_child_dies_with_its_parent(stopped: bool) -> None:
    command = [sys.executable, "-c", PARENT, str(tiny_model())]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if stopped:  # it cannot notice the closed socket: only the kernel can end it
            os.kill(child, signal.SIGSTOP)
        parent.kill()
        wait_for_exit(child)


async def test_close_ends_the_child_and_fails_what_runs() -> None:
    async with running_engine(gen_max=ENDLESS_TOKENS) as engine:
        stream = await engine.submit(endless("a", PROMPT))
        pid = engine.pid
        assert pid is not None
        await engine.close()
        with pytest.raises(Unavailable):
            await collect(stream)
        wait_for_exit(pid)
        with pytest.raises(Unavailable) as caught:
            await engine.submit(Submit("b", PROMPT, 3))
        assert caught.value.reason == "DRAINING"
        await engine.close()


async def test_close_before_ready_ends_the_child() -> None:
    client = EngineClient(tiny_config())
    await client.start()
    await client.close()
    assert client.pid is None


def test_start_outside_the_main_thread_is_refused() -> None:
    caught: list[SkimError] = []

    def start() -> None:
        try:
            asyncio.run(EngineClient(tiny_config()).start())
        except SkimError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(10)
    assert len(caught) == 1 and "main thread" in caught[0].message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ModelFileError", ModelFileError),
        ("NoSuchError", EngineFault),
        ("annotations", EngineFault),
    ],
)
def test_error_crosses_the_socket_by_its_class_name(name: str, kind: type[SkimError]) -> None:
    error = error_from(name, "REASON", "words")
    assert type(error) is kind and (error.reason, error.message) == ("REASON", "words")
