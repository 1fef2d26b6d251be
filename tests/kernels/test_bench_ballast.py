"""What makes a card small, and what plants lists in a running service: on the emulated device."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from bench import ballast
from bench.ballast import GRAIN_BYTES, hold
from bench.planted_drafter import DensityFile
from kernels.reference import BlockRule
from tests.emulator.device import EmulatedDevice
from tests.tools import require_tool

TOTAL_BYTES = 100 << 20
RULE = BlockRule(alpha=0.1, sink_blocks=1, window_blocks=1, last_full_blocks=1, max_density=0.25)


@pytest.fixture
def device() -> EmulatedDevice:
    require_tool("g++")
    return EmulatedDevice("sm_80", total_bytes=TOTAL_BYTES)


def test_ballast_leaves_what_was_asked_to_a_grain(device: EmulatedDevice) -> None:
    leave = 33 << 20
    held = hold(device, leave)
    assert 0 <= device.free_bytes() - leave < GRAIN_BYTES
    for memory in held:
        memory.close()
    assert device.free_bytes() == TOTAL_BYTES


def test_a_card_with_less_free_than_asked_is_refused(device: EmulatedDevice) -> None:
    with pytest.raises(ValueError, match="bytes are free, asked to leave"):
        hold(device, TOTAL_BYTES + 1)


def test_ballast_says_what_it_holds_and_lets_go_at_the_end_of_its_input(
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    leave_gib = (60 << 20) / (1 << 30)
    assert ballast.main(["--leave-gib", str(leave_gib)], lambda: device) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"held_bytes": 40 << 20, "free_bytes": 60 << 20}
    assert device.free_bytes() == TOTAL_BYTES


def test_a_density_file_is_read_at_each_pass_and_not_within_one(tmp_path: Path) -> None:
    planted = DensityFile(tmp_path / "density")
    assert planted(0, 2, 8, RULE) is None  # no file: the selection decides
    planted.write(0.9)
    assert planted(1, 2, 8, RULE) is None
    first = planted(0, 2, 8, RULE)
    assert first is not None and first.density > 0.8
    planted.write(0.6)
    assert planted(1, 2, 8, RULE) is first
    second = planted(0, 2, 8, RULE)
    assert second is not None and second.density < 0.7
    planted.write(None)
    assert planted(0, 2, 8, RULE) is None
