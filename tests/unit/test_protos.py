"""The committed stubs are what the protos generate, and the protos pass the linter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tools import ROOT, require_tool


def test_committed_stubs_equal_freshly_generated_ones(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "protos/generate.py"), str(tmp_path)], check=True, timeout=100
    )
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "skim/v1").iterdir()}
    committed = {
        path.name: path.read_bytes() for path in (ROOT / "skim/v1").iterdir() if path.is_file()
    }
    assert sorted(committed) == sorted(fresh)
    assert [name for name in fresh if fresh[name] != committed[name]] == []


def test_protos_pass_the_linter() -> None:
    buf = require_tool("buf")
    result = subprocess.run(
        [buf, "lint", "protos"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
