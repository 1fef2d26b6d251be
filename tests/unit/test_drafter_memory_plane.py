"""When a drafter's weights are leased, and what the settings may say about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drafter_svc.__main__ import make_plane
from drafter_svc.config import DrafterSettings
from drafter_svc.memory_plane import MemoryPlane
from skim.errors import ConfigError
from tests.emulator.device import EmulatedDevice
from tests.tools import require_tool

SOCKET = Path("memory.sock")


def settings(**options: Any) -> DrafterSettings:
    return DrafterSettings.load(overrides={"model": Path("tiny.gguf"), **options})


def test_weights_are_the_drafters_own_unless_a_socket_is_named() -> None:
    assert make_plane(settings(backend="cpu"), None, None) is None


def test_socket_is_of_no_use_to_passes_on_the_cpu() -> None:
    assert make_plane(settings(backend="cpu", memory_socket=SOCKET), None, None) is None


def test_socket_and_a_device_make_a_plane() -> None:
    require_tool("g++")
    plane = make_plane(settings(memory_socket=SOCKET), None, EmulatedDevice())
    assert plane is not None
    plane.close()
    plane.close()


def test_plane_without_a_socket_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory_socket"):
        MemoryPlane(settings())


@pytest.mark.parametrize("name", ["pace_work_ms", "pace_pause_ms"])
@pytest.mark.parametrize("value", [-1.0, 1_001.0, float("nan")])
def test_pacing_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        settings(**{name: value})
