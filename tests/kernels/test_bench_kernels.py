"""The kernels' benchmark runs every kernel it names, on the emulator."""

from __future__ import annotations

import json

import pytest

from bench.kernels import main
from kernels.ops.dequant import DEQUANT_TYPES
from tests.emulator.device import EmulatedDevice
from tests.tools import require_tool


def test_every_kernel_has_a_row_with_the_bytes_it_moves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    require_tool("g++")
    assert main(["--tokens", "64", "--vocab-size", "16", "--launches", "1"], EmulatedDevice) == 0
    rows = {
        row["kernel"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    }
    moving = {"embed", "rmsnorm", "silu_mul", "qk_norm_rope", "tail_score", "chunk_reduce"}
    assert set(rows) == moving | {f"dequant {name}" for name in DEQUANT_TYPES}
    assert rows["rmsnorm"]["bytes"] == 64 * 1024 * (4 + 2)
    assert rows["dequant Q8_0"]["bytes"] == 16 * 1024 // 32 * 34 + 16 * 1024 * 2
    assert all(row["seconds"] > 0 for row in rows.values())


def test_no_launches_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--launches", "0"], EmulatedDevice)
    assert "one launch" in capsys.readouterr().err
