"""The benchmark of both services at once, run whole on a fake GPU: its rows are right, not times.

End to end this also shows that the drafter pauses while the target decodes, and only then: nobody
but the target's own lease tells it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import decode_beside
from tests.fixtures.stack_on_fake import run_on_fake

SETTINGS = ("SKIM_TARGET_KEPT_MAX=1024", "SKIM_DRAFTER_DENSE_BELOW_TOKENS=0")
PAUSE_MS = 1_000.0


@pytest.mark.timeout(240)
def test_passes_pause_while_an_answer_decodes_and_only_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on_fake(monkeypatch, decode_beside)
    options = "--small --tokens 400 --density 0.9 --repeats 1 --beside-s 0 --answer-tokens 64"
    pace = f"--work-ms 0 --pause-ms {PAUSE_MS} --other-work-ms= --models {tmp_path}"
    chosen = [word for setting in SETTINGS for word in ("--set", setting)]
    record = tmp_path / "run.jsonl"
    arguments = [*options.split(), *pace.split(), *chosen, "--budget-s", "200"]
    status = decode_beside.main([*arguments, "--record", str(record)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, summary["failed"], summary["left_out"]) == (0, [], [])
    assert [row["name"] for row in summary["rows"]] == ["paced", "unpaced"]
    paced, unpaced = (row["pass_ms"]["p50"] for row in summary["rows"])
    alone = summary["pass_alone_ms"]["400"]["p50"]
    # Two layers have three places to pause, each worth a whole pause with no work to be done first.
    assert paced > 3 * PAUSE_MS > PAUSE_MS > max(alone, unpaced)
    assert summary["step_alone_ms"]["n"] == 63 - decode_beside.WARM_TOKENS
    kinds = [json.loads(line)["kind"] for line in record.read_text().splitlines()]
    assert kinds == [
        *("run", "starting", "stack", "step_alone", "pass_alone"),
        *("beside", "restarted", "beside", "region"),
    ]


def test_a_run_without_time_left_measures_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--small", "--tokens", "400", "--models", str(tmp_path), "--budget-s", "0"]
    assert decode_beside.main(arguments) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["rows"] == []
    assert summary["left_out"] == ["everything: the budget is spent"]


def test_a_pace_from_outside_that_would_beat_the_rows_own_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKIM_DRAFTER_PACE_PAUSE_MS", "15")
    with pytest.raises(SystemExit):
        decode_beside.parse([])
    assert "SKIM_DRAFTER_PACE_PAUSE_MS" in capsys.readouterr().err
