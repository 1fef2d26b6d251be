"""The `skim` program as users run it: its own process, its exit codes, its last line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from skim.cli.bundled import TARGET, bundled_model
from skim.client import Client
from tests.e2e.conftest import CROSS_NAME, ENVIRONMENT, ROOT, WAIT_S, System, engine_of, until

Prose = Callable[[int], str]
SKIM = (sys.executable, "-m", "skim.cli")


def run_skim(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SKIM, *arguments],
        input=text,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=2 * WAIT_S,
        check=False,
    )


def start_skim(*arguments: str, **pipes: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.Popen(
        [*SKIM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment,
        text=True,
        # A shell that started the tests in the background has made them, and so us, deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **pipes,
    )


def last_object(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def test_ask_reads_standard_input_and_ends_in_one_json_line(system: System, prose: Prose) -> None:
    options = ("--skim", "--keep", "0.2", "--max-tokens", "4", "--json")
    ran = run_skim(
        "ask", "What?", "--file", "-", "--gateway", system.address, *options, text=prose(2_048)
    )
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stdout.splitlines()
    found = json.loads(line)
    assert found["skimmed"] is True
    assert found["keep_ratio"] == pytest.approx(0.2, abs=0.05)
    assert found["spans"][0][0] == 0
    assert found["ttft_s"] > 0
    assert "time to first token" in ran.stderr


def test_ask_shows_answer_strip_and_timings_as_plain_text(
    system: System, prose: Prose, tmp_path: Path
) -> None:
    file = tmp_path / "book.txt"
    file.write_text(prose(2_048))
    ran = run_skim(
        "ask", "What?", "--file", str(file), "--gateway", system.address, "--skim", "--keep", "0.2"
    )
    assert ran.returncode == 0, ran.stderr
    assert "\x1b[" not in ran.stdout
    assert "kept" in ran.stdout
    assert "prefill" in ran.stdout
    strips = [line for line in ran.stdout.splitlines() if set(line) <= set(".:-=+*#%@")]
    assert max(map(len, strips)) == 80


def test_ctrl_c_cancels_the_request_and_ends_with_130(
    system: System, client: Client, prose: Prose
) -> None:
    where = ("--gateway", system.address, "--full", "--max-tokens", "2000")
    asking = start_skim("ask", "What?", "--file", "-", *where, stdin=subprocess.PIPE)
    with asking:
        assert asking.stdin
        asking.stdin.write(prose(12_000))
        asking.stdin.close()
        until(lambda: system.load().running == 1, "the target runs the request")
        asking.send_signal(signal.SIGINT)
        assert asking.wait(WAIT_S) == 130
    until(system.idle, "the target is idle", timeout_s=3.0)


def test_ask_without_services_says_how_to_start_them() -> None:
    ran = run_skim("ask", "What?", "--file", "-", "--gateway", "127.0.0.1:1", text="A book.")
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "no gateway answers at 127.0.0.1:1" in ran.stderr
    assert "skim up" in ran.stderr


def test_refused_option_is_one_line_with_field_got_and_allowed(system: System) -> None:
    where = ("--gateway", system.address, "--keep", "2")
    ran = run_skim("ask", "What?", "--file", "-", *where, text="A book.")
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert all(part in ran.stderr for part in ("keep_ratio", "2", "(0, 1]"))


def test_up_with_a_port_in_use_names_it_and_starts_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run_skim("up", "--port", str(port))
    assert ran.returncode == 2
    assert f"127.0.0.1:{port} for the gateway: the port is in use" in ran.stderr


def test_up_with_a_model_that_is_cut_short_says_so(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    whole = bundled_model(TARGET).read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    logs = ("--log-dir", str(tmp_path / "logs"))
    ran = run_skim("up", "--port", "0", "--target", str(cut), *logs, "--json")
    assert ran.returncode == 2
    error = last_object(ran.stdout)["error"]
    assert "cut.gguf" in error["message"]
    assert "cut short" in error["message"]


def test_up_drains_on_a_signal_and_leaves_nothing_behind(tmp_path: Path, prose: Prose) -> None:
    running = start_skim("up", "--port", "0", "--json", "--log-dir", str(tmp_path))
    with running:
        assert running.stdout
        ready = json.loads(running.stdout.readline())
        children = psutil.Process(running.pid).children(recursive=True)
        gateway = ready["services"]["gateway"]["address"]
        with Client(gateway, deadline_s=WAIT_S) as client:
            with client.ask("What?", prose(1_500), max_tokens=64, stream=True) as stream:
                events = iter(stream)
                next(events)
                running.send_signal(signal.SIGTERM)
                # The request that runs is finished, not cut.
                assert type(list(events)[-1]).__name__ == "Finish"
        assert running.wait(WAIT_S) == 0
        assert json.loads(running.stdout.readline())["event"] == "stopped"
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert len(children) >= 4
    assert alive == []


def test_up_that_is_killed_takes_services_and_engine_with_it(tmp_path: Path) -> None:
    running = start_skim("up", "--port", "0", "--json", "--log-dir", str(tmp_path))
    with running:
        assert running.stdout
        ready = json.loads(running.stdout.readline())
        children = psutil.Process(running.pid).children(recursive=True)
        assert engine_of(ready["services"]["target"]["pid"]) in children
        running.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert alive == []


def test_models_lists_the_target_and_both_drafters(system: System) -> None:
    ran = run_skim("models", "--gateway", system.address, "--json")
    listed = [(model["name"], model["kind"]) for model in last_object(ran.stdout)["models"]]
    assert listed == [
        ("skim-target", "target"),
        ("skim-drafter", "drafter"),
        (CROSS_NAME, "drafter"),
    ]


def test_tokens_counts_as_the_target_does(system: System, client: Client, prose: Prose) -> None:
    ran = run_skim("tokens", "--file", "-", "--gateway", system.address, "--json", text=prose(500))
    assert last_object(ran.stdout)["prompt_tokens"] == client.count_tokens(prose(500))


def test_drafters_swap_changes_the_model_and_back(system: System, client: Client) -> None:
    admin = ("--admin", system.stack.address("drafter", admin=True), "--json")
    there = run_skim("drafters", "swap", CROSS_NAME, *admin)
    back = run_skim("drafters", "swap", "skim-drafter", *admin)
    assert last_object(there.stdout)["previous"] == "skim-drafter"
    assert last_object(back.stdout)["previous"] == CROSS_NAME
    until(lambda: all(m.serving for m in client.models().models), "the drafters serve again")


def test_swap_at_a_service_without_drafters_says_who_has_them(system: System) -> None:
    admin = ("--admin", system.stack.address("target", admin=True))
    ran = run_skim("drafters", "swap", CROSS_NAME, *admin)
    assert ran.returncode == 2
    assert "ask the drafter's admin port" in ran.stderr
