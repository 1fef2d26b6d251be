"""A tenant and a scripted landlord on a socket of their own; what either leaks fails the test."""

from __future__ import annotations

import gc
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulator.device import EmulatedDevice
from tests.fixtures.landlord import ScriptedLandlord, Tenant
from tests.tools import open_descriptors, require_tool


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="skim-") as made:
        yield Path(made)


@pytest.fixture
def landlord(folder: Path) -> Iterator[ScriptedLandlord]:
    made = ScriptedLandlord(folder / "s")
    yield made
    made.die()


@pytest.fixture
def tenant(landlord: ScriptedLandlord) -> Iterator[Tenant]:
    require_tool("g++")
    before = open_descriptors()
    made = Tenant(landlord.path, EmulatedDevice(), patience_s=0.2)
    yield made
    made.close()
    landlord.die()
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]
    gc.collect()
    assert landlord.physical.used_bytes() == 0  # which also ends the fake's own files
    assert open_descriptors() <= before
