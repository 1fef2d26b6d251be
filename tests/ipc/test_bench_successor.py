"""The benchmark of a drafter's restart, whole, on fake memory and an emulated device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from bench.successor import main
from kernels.ipc.fake_physical import FakePhysical
from tests.tools import require_tool

OPTIONS = ["--model-shape", "small", "--kills", "1", "--states", "resident", "--tokens", "60"]
SERVICE = ["--service", "tests.fixtures.drafter_on_fake"]


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A benchmark sets its process's logs up, on a stream that ends with the test."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()


def test_successor_is_given_the_region_and_every_stage_has_its_time(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_tool("g++")
    physical = FakePhysical(64 << 20)
    assert main([*OPTIONS, *SERVICE, "--scratch", str(folder)], lambda _: physical) == 0
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (first["given"], second["given"]) == ("FILL", "REGION")
    assert (first["after"], second["after"]) == ("nobody", "killed resident")
    for row in (first, second):
        assert 0 < row["first line"] < row["region"] < row["scored"] and row["right_tenant"]
