"""The target as a process: start, refusal to start, health, admin port, SIGTERM, doctor."""

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
import psutil
import pytest

from skim.rpc_errors import from_rpc_error
from skim.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    memory_pb2,
    memory_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
)
from tests.fixtures.engine import tiny_model
from tests.fixtures.target import config, full, messages
from tests.tools import has_ended

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0  # imports take seconds on a busy machine


def command(**settings: Any) -> dict[str, Any]:
    given = {
        "listen": "127.0.0.1:0",
        "admin_listen": "127.0.0.1:0",
        "threads": 1,
        "kept_max": 512,
        "gen_max": 64,
        "calibration_s": 0.0,
        **settings,
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SKIM_")}
    for name, value in given.items():
        environment[f"SKIM_TARGET_{name.upper()}"] = str(value)
    return {
        "args": [sys.executable, "-m", "target_svc"],
        "cwd": ROOT,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def refusal(**settings: Any) -> str:
    """Run a target that cannot start; return its last line on standard error."""
    done = subprocess.run(**command(**settings), timeout=START_S, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1 and lines[0].startswith("target: ")
    return lines[0]


@contextmanager
def started(**settings: Any) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run a target until its model is loaded; give the process and its first events by name."""
    process = subprocess.Popen(**command(**settings))
    try:
        events: dict[str, Any] = {}
        assert process.stderr is not None
        while "target_ready" not in events:
            line = process.stderr.readline()
            assert line, "the target ended"
            event = json.loads(line)
            events[event["event"]] = event
        yield process, events
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def cut_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "cut.gguf"
    path.write_bytes(tiny_model().read_bytes()[:300_000])
    return path


def test_a_file_that_is_no_model_is_one_line_and_status_2(cut_model: Path) -> None:
    assert cut_model.name in refusal(model=cut_model)


def test_an_architecture_that_llama_cpp_lacks_is_one_line_and_status_2(tmp_path: Path) -> None:
    data = tiny_model().read_bytes()
    path = tmp_path / "odd.gguf"
    path.write_bytes(data.replace(b"qwen3", b"qwenX"))
    assert "qwenX" in refusal(model=path)


def test_a_port_in_use_is_one_line_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in refusal(model=tiny_model(), listen=address)


def test_bad_settings_are_one_line_and_status_2() -> None:
    line = refusal(model=tiny_model(), slots=0, kv_type="q5_0")
    assert "SKIM_TARGET_SLOTS" in line and "SKIM_TARGET_KV_TYPE" in line


def test_it_serves_logs_no_prompt_and_drains_on_sigterm() -> None:
    prompt = b"Nobody shall read this sentence in a log."
    with started(model=tiny_model()) as (process, events):
        engines = psutil.Process(process.pid).children()
        with grpc.insecure_channel(f"127.0.0.1:{events['listening']['port']}") as channel:
            stub = target_pb2_grpc.TargetServiceStub(channel)
            stream = messages(prompt, full(), config(request_id="r-1"))
            replies = list(stub.Generate(iter(stream), timeout=START_S))
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=START_S)
        assert process.returncode == 0
    assert replies[-1].HasField("finish")
    answered = json.loads(next(line for line in log.splitlines() if '"answered"' in line))
    assert (answered["request_id"], answered["service"]) == ("r-1", "target")
    assert "sentence" not in log
    assert engines and all(has_ended(engine) for engine in engines)


def test_a_killed_service_takes_its_engine_along() -> None:
    with started(model=tiny_model()) as (process, _):
        engines = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        assert engines
        _, alive = psutil.wait_procs(engines, timeout=10)
        assert all(has_ended(engine) for engine in alive)


def test_an_engine_that_cannot_come_back_ends_the_service_with_one_line(tmp_path: Path) -> None:
    model, garbage = tmp_path / "model.gguf", tmp_path / "garbage"
    model.write_bytes(tiny_model().read_bytes())
    garbage.write_bytes(b"GGUF" + bytes(100))
    with started(model=model) as (process, _):
        garbage.replace(model)  # the living engine keeps the old file mapped
        (engine,) = psutil.Process(process.pid).children()
        engine.kill()
        _, log = process.communicate(timeout=START_S)
        assert process.returncode == 2
    line = log.splitlines()[-1]
    assert line.startswith("target: ") and "model.gguf" in line


def test_the_admin_port_tells_settings_drains_and_says_what_it_has_not() -> None:
    with started(model=tiny_model(), name="tiny") as (_, events):
        address = f"127.0.0.1:{events['listening']['admin_port']}"
        with grpc.insecure_channel(address) as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            found = admin.GetConfig(admin_pb2.GetConfigRequest(), timeout=START_S).settings
            assert (found["name"], found["kept_max"], found["kv_type"]) == ("tiny", "512", "f16")
            memory = memory_pb2_grpc.MemoryServiceStub(channel)
            absent = [
                lambda: admin.SwapDrafter(admin_pb2.SwapDrafterRequest(), timeout=START_S),
                lambda: admin.LoadDrafter(admin_pb2.LoadDrafterRequest(), timeout=START_S),
                lambda: memory.ListRegions(memory_pb2.ListRegionsRequest(), timeout=START_S),
                lambda: memory.Park(memory_pb2.ParkRequest(), timeout=START_S),
                lambda: list(memory.Unpark(memory_pb2.UnparkRequest(), timeout=START_S)),
                lambda: list(memory.WatchState(memory_pb2.WatchStateRequest(), timeout=START_S)),
            ]
            for call in absent:
                with pytest.raises(grpc.RpcError) as refused:
                    call()
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
                assert len(from_rpc_error(refused.value).message.split()) > 5  # a sentence
            with pytest.raises(grpc.RpcError) as refused:
                admin.Drain(admin_pb2.DrainRequest(grace_s=-1.0), timeout=START_S)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            # Nothing runs, so it does not wait: its grace is far longer than the call may take.
            idle = admin_pb2.DrainRequest(grace_s=3_000.0)
            assert admin.Drain(idle, timeout=START_S).unfinished == 0
        with grpc.insecure_channel(f"127.0.0.1:{events['listening']['port']}") as channel:
            stub = target_pb2_grpc.TargetServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.GetTarget(target_pb2.GetTargetRequest(), timeout=START_S)
            assert from_rpc_error(refused.value).reason == "DRAINING"


def test_the_calibration_gives_the_first_request_a_measured_estimate() -> None:
    with started(model=tiny_model(), calibration_s=5.0, kept_max=2048) as (_, events):
        with grpc.insecure_channel(f"127.0.0.1:{events['listening']['port']}") as channel:
            stub = target_pb2_grpc.TargetServiceStub(channel)
            assert stub.GetTarget(target_pb2.GetTargetRequest()).prefill_tokens_per_s > 0.0
            stream = messages(b"A first prompt.", full())
            first = next(iter(stub.Generate(iter(stream), timeout=START_S)))
            assert first.tokenised.full_prefill_estimate_s > 0.0


def test_the_doctor_runs_a_model_and_says_what_is_wrong_with_another(cut_model: Path) -> None:
    run = {**command(calibration_s=1.0), "args": [sys.executable, "-m", "target_svc.doctor"]}
    run["args"] += [str(tiny_model()), str(cut_model)]
    done = subprocess.run(**run, timeout=START_S, check=False)
    library, model, cut = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1 and library["ok"] and "llama-cpp-python" in library["lines"][0]
    assert model["ok"] and model["prefill_tokens_per_s"] > 0 and model["cells"] >= 576
    assert not cut["ok"] and "cut.gguf" in cut["lines"][0]
