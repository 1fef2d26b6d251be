"""The drafter's doctor, as `skim doctor` runs it."""

from __future__ import annotations

import json

from drafter_svc import doctor
from tests.fixtures.engine import tiny_model


def test_doctor_skims_a_text_with_each_model_and_reports_what_cannot_be_read(capsys):
    assert doctor.main([str(tiny_model()), __file__]) == 1
    here, model, broken = map(json.loads, capsys.readouterr().out.splitlines())
    assert here["ok"] and here["backend"] == "cpu" and here["cores"] >= 1
    assert model["ok"] and model["tokens_per_s"] > 0
    assert 0 < model["kept_tokens"] <= 0.1 * model["prompt_tokens"]
    assert not broken["ok"] and "not a GGUF" in broken["lines"][0]


def test_doctor_without_a_model_says_where_passes_run(capsys):
    assert doctor.main([]) == 0
    (report,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "CPU" in report["lines"][0]


def test_doctor_reports_a_bad_setting(monkeypatch, capsys):
    monkeypatch.setenv("SKIM_DRAFTER_ALPHA", "7")
    assert doctor.main([str(tiny_model())]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "SKIM_DRAFTER_ALPHA" in report["lines"][0]
