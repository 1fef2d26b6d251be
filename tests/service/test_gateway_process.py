"""`python -m gateway` as a process: how it starts, refuses to, and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

WAIT_S = 60.0


def command(**settings: str) -> subprocess.Popen[str]:
    """Start a gateway; no service needs to be there for it to live."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SKIM_")},
        "SKIM_GATEWAY_LISTEN": "127.0.0.1:0",
        "SKIM_GATEWAY_ADMIN_LISTEN": "127.0.0.1:0",
        "SKIM_GATEWAY_TARGET": "127.0.0.1:1",
        "SKIM_GATEWAY_DRAFTERS": "",
        **{f"SKIM_GATEWAY_{name}": value for name, value in settings.items()},
    }
    return subprocess.Popen(
        [sys.executable, "-m", "gateway"], stderr=subprocess.PIPE, text=True, env=environment
    )


def test_sigterm_ends_it_cleanly() -> None:
    process = command()
    assert process.stderr is not None
    for line in process.stderr:
        if "listening" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert "Traceback" not in rest


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = command(LISTEN=address)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith(f"gateway: cannot listen on {address}")
    assert "Traceback" not in errors


def test_a_bad_setting_is_one_line() -> None:
    process = command(TOKEN="a", TOKEN_FILE="b")
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert "exclude each other" in errors.splitlines()[-1]
    assert "Traceback" not in errors
