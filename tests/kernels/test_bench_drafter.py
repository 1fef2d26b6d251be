"""The drafter's benchmark, run whole on the emulated device: its rows are right, not its times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import drafter
from bench.random_model import SHAPES, RandomShape
from tests.emulator.device import EmulatedDevice
from tests.tools import require_tool

TINY = RandomShape("llama", 2, 64, 2, 1, 64, 96, 512, 1e-6, 1e4, 4096, rope_freqs=True)


@pytest.fixture
def summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """The last line of a run over a planted and a natural row, and no time for a third."""
    require_tool("g++")
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    options = "--shapes tiny --tokens 400 --densities 0.9,natural --passes 2 --natural-passes 1"
    rest = f"--dense-below 0 --bundled-tokens= --torch-tokens 400 --scratch {tmp_path}"
    assert drafter.main([*options.split(), *rest.split()], lambda: EmulatedDevice("sm_80")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("emulated")
    last: dict[str, Any] = json.loads(printed[-1])
    return last


def test_benchmark_prints_planted_and_natural_rows_and_what_it_left_out(
    summary: dict[str, Any],
) -> None:
    planted, natural = summary["rows"]
    assert (planted["lists"], planted["passes"]) == ("planted", 2)
    assert (natural["lists"], natural["density"]) == ("natural", 1.0)
    assert planted["tokens"] == natural["tokens"] == 400
    assert planted["peak_bytes"] == planted["planned_bytes"] + planted["planted_bytes"] > 0
    assert planted["plan_bytes"]["x"] == 4 * 400 * TINY.embed
    assert sum(planted["stage_s"].values()) <= planted["slowest_s"]
    assert planted["times_faster_than_dense"] is None
    assert any("PyTorch" in row for row in summary["left_out"])


def test_rows_past_the_budget_are_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_tool("g++")
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    options = f"--shapes tiny --tokens 400 --bundled-tokens= --budget-s 0 --scratch {tmp_path}"
    drafter.main(options.split(), lambda: EmulatedDevice("sm_80"))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["rows"] == []
    assert last["left_out"][0] == "tiny 400 planted 0.05"
