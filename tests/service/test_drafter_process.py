"""The drafter as a process: start, refusal to start, SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from skim.v1 import drafter_pb2, drafter_pb2_grpc
from tests.fixtures.drafter_service import long_text, messages
from tests.fixtures.engine import tiny_model

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0  # imports take seconds on a busy machine


def command(**settings: Any) -> dict[str, Any]:
    given = {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", "threads": 1, **settings}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SKIM_", "OPENBLAS"))}
    for name, value in given.items():
        environment[f"SKIM_DRAFTER_{name.upper()}"] = str(value)
    return {
        "args": [sys.executable, "-m", "drafter_svc"],
        "cwd": ROOT,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def refusal(**settings: Any) -> str:
    """Run a drafter that cannot start; return its last line on standard error."""
    done = subprocess.run(**command(**settings), timeout=START_S, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr.splitlines()[-1]


@contextmanager
def started(**settings: Any) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run a drafter until its model is loaded; give the process and its first events by name."""
    process = subprocess.Popen(**command(**settings))
    try:
        events: dict[str, Any] = {}
        assert process.stderr is not None
        while "drafter_loaded" not in events:
            line = process.stderr.readline()
            assert line, "the drafter ended"
            event = json.loads(line)
            events[event["event"]] = event
        yield process, events
    finally:
        process.kill()
        process.communicate()


def test_file_that_is_no_model_is_one_line_and_status_2(tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model().read_bytes()[:5_000])
    for path in (cut, tmp_path / "missing.gguf"):
        line = refusal(model=path)
        assert line.startswith("drafter: ") and path.name in line


def test_port_in_use_is_one_line_and_status_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refusal(model=tiny_model(), listen=address)
    assert line.startswith("drafter: ") and address in line


def test_bad_settings_are_one_line_and_status_2():
    line = refusal(model=tiny_model(), keep_ratio=1.5, pool_kernel=4)
    assert "SKIM_DRAFTER_KEEP_RATIO" in line and "SKIM_DRAFTER_POOL_KERNEL" in line
    assert "SKIM_DRAFTER_QEUE" in refusal(model=tiny_model(), qeue=1)
    assert "CUDA" in refusal(model=tiny_model(), backend="cuda")


def test_process_serves_logs_no_prompt_and_drains_on_sigterm():
    prompt = long_text(2)
    with started(model=tiny_model()) as (process, events):
        with grpc.insecure_channel(f"127.0.0.1:{events['listening']['port']}") as channel:
            stub = drafter_pb2_grpc.DrafterServiceStub(channel)
            assert stub.GetDrafter(drafter_pb2.GetDrafterRequest(), timeout=START_S).layers == 2
            replies = list(stub.Score(iter(messages(prompt, request_id="r-1")), timeout=START_S))
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=START_S)
        assert process.returncode == 0
    assert replies[-1].result.spans.prompt_bytes == len(prompt)
    scored = json.loads(next(line for line in log.splitlines() if '"scored"' in line))
    assert (scored["request_id"], scored["service"]) == ("r-1", "drafter")
    assert "lighthouse" not in log
    assert events["drafter_loaded"]["backend"] == "cpu"


@pytest.mark.parametrize("name", ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_libraries_get_one_thread_before_numpy_is_imported(name):
    code = (
        "import builtins, os, sys\n"
        "original = builtins.__import__\n"
        "def watch(module, *rest, **more):\n"
        "    if module.split('.')[0] == 'numpy' and 'numpy' not in sys.modules:\n"
        f"        print(os.environ.get({name!r})); sys.stdout.flush(); os._exit(0)\n"
        "    return original(module, *rest, **more)\n"
        "builtins.__import__ = watch\n"
        "import drafter_svc.__main__\n"
    )
    run = command()
    run["args"] = [sys.executable, "-c", code]
    run["env"].pop(name, None)
    assert subprocess.run(**run, timeout=START_S, check=True).stdout.strip() == "1"
