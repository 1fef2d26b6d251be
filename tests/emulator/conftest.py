"""The fixture through which the emulator's own tests run a probe."""

from __future__ import annotations

import pytest

from tests.emulator.running import Run, run_probe
from tests.tools import require_tool


@pytest.fixture
def run() -> Run:
    """`tests.emulator.running.run_probe`, where there is a compiler."""
    require_tool("g++")
    return run_probe
