"""The benchmark of the whole path, run whole on a CPU: its rows are right, not its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import ttft
from bench.ttft_record import STAGES
from tests.fixtures.stack_on_fake import run_on_fake

SETTINGS = (
    "SKIM_TARGET_KEPT_MAX=1024",
    "SKIM_TARGET_GEN_MAX=16",
    "SKIM_TARGET_CALIBRATION_S=0",
    "SKIM_DRAFTER_DENSE_BELOW_TOKENS=256",
)


@pytest.mark.timeout(240)
def test_benchmark_measures_skimmed_full_and_plain_requests_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "run.jsonl"
    options = "--small --tokens 600 --keeps 0.1 --lists natural,0.05 --modes resident,park"
    rest = f"--repeats 1 --vanilla-repeats 1 --answer-tokens 2 --models {tmp_path} --json"
    chosen = [word for setting in SETTINGS for word in ("--set", setting)]
    status = ttft.main([*options.split(), *rest.split(), *chosen, "--record", str(record)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, summary["failed"]) == (0, [])
    skimmed, full = summary["rows"]
    assert (skimmed["path"], skimmed["lists"], skimmed["keep"]) == ("skim", "natural", 0.1)
    assert 0.1 < skimmed["kept_share"] < full["kept_share"] == 1.0
    for row in (skimmed, full):
        assert row["tokens"] == 600
        assert sum(row["stages_s"][stage] for stage in STAGES) == pytest.approx(
            row["ttft_s"]["median"]
        )
    assert skimmed["stages_s"]["score"] > 0.0 == full["stages_s"]["score"]
    assert [row["tokens"] for row in summary["vanilla"]] == [600]
    assert any("planted 0.05" in what for what in summary["left_out"])
    assert any("park" in what for what in summary["left_out"])
    assert ttft.main(["--summarise", str(record), "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["rows"] == summary["rows"]


def test_rows_past_the_budget_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--small --tokens 600 --vanilla-repeats 0 --budget-s 0 --models {tmp_path} --json"
    chosen = [word for setting in SETTINGS for word in ("--set", setting)]
    assert ttft.main([*options.split(), *chosen]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["rows"] == []
    assert summary["left_out"] == ["all of resident: the budget is spent"]


@pytest.mark.timeout(240)
def test_parked_mode_plants_lists_and_brings_the_weights_back_for_each_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on_fake(monkeypatch, ttft)
    options = "--small --tokens 400 --keeps 0.1 --lists 0.9 --modes park --leave-gib 0 --repeats 2"
    rest = f"--vanilla-repeats 0 --answer-tokens 2 --models {tmp_path} --json"
    settings = (*SETTINGS, "SKIM_DRAFTER_DENSE_BELOW_TOKENS=0")
    chosen = [word for setting in settings for word in ("--set", setting)]
    record = tmp_path / "run.jsonl"
    status = ttft.main([*options.split(), *rest.split(), *chosen, "--record", str(record)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, summary["failed"], summary["left_out"]) == (0, [], [])
    (row,) = summary["rows"]
    assert (row["mode"], row["lists"], row["samples"]) == ("park", "planted 0.9", 2)
    assert row["stages_s"]["unpark"] > 0.0
    events = [json.loads(line) for line in record.read_text().splitlines()]
    generations = [e["generation"][0] for e in events if e["kind"] in ("warm_up", "sample")]
    assert len(generations) == 3 and sorted(set(generations)) == generations
    (region,) = next(e["regions"] for e in events if e["kind"] == "region")
    assert region["state"] in ("PARKING", "PARKED")
