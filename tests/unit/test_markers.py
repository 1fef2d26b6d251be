"""The tests run without pyproject.toml, as they do where a GPU's machine has only their folder."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.tools import ROOT


def test_markers_are_known_without_pyproject() -> None:
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", "-p", "no:asyncio", "--strict-markers", "--collect-only"]
    command += ["-W", "error", "-m", "gpu", "-q", "tests/kernels/test_block_mean.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
