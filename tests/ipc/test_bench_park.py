"""The benchmark of park and unpark, whole, on fake memory: three real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from bench.park import main
from tests.fixtures.park_on_fake import open_fake
from tests.tools import require_tool

ON_FAKE = ["--peers", "tests.fixtures.park_on_fake", "--models", "tiny", "--long-model", "tiny"]


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A benchmark sets its process's logs up, on a stream that ends with the test."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Standard output's lines; the benchmark found nothing wrong."""
    require_tool("g++")
    assert main([*ON_FAKE, *arguments], open_fake) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("transport", ["vmm_fd", "legacy_ipc"])
def test_every_figure_is_there_and_every_byte_accounted_for(
    capsys: pytest.CaptureFixture[str], transport: str
) -> None:
    sizes = ["--workspace-bytes", "8388608", "--workspace-parks", "2", "--long-cycles", "20"]
    lines = run(capsys, "--cycles", "3", "--pause-ms", "1", "--transport", transport, *sizes)
    summary = json.loads(lines[-1])
    assert summary["transport"] == transport
    (row,) = summary["rows"]
    assert row["freed_bytes"] == row["observed_freed_bytes"] == row["size_bytes"]
    assert row["same"] and row["long"]["same"]
    assert row["with_workspace"]["workspace_bytes"] == 8 << 20
    assert row["spaced"]["last_ms"]["n"] == row["back_to_back"]["last_ms"]["n"] == 3
    mapped, first, last = (
        row["spaced"][f"{what}_ms"]["p50"] for what in ("mapped", "first", "last")
    )
    assert 0 < mapped < first < last
    assert 0 < row["unmapped_ms"]["p50"] < row["park_ms"]["p50"]
    assert row["long"]["cycles"] == 20
    assert row["long"]["grown"] == {"used_bytes": 0, "landlord_fds": 0, "tenant_fds": 0}
    assert lines[1].split()[:2] == ["model", "GB"] and lines[2].split()[0] == "tiny"


def test_what_exceeds_the_budget_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--budget-s", "0", "--json")
    summary = json.loads(lines[-1])
    assert summary["rows"] == [] and summary["left_out"] == ["tiny"] and len(lines) == 1
