"""The drafter's doctor, as `skim doctor` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from drafter_svc import doctor, drafter
from skim.errors import Busy
from tests.fixtures.engine import tiny_model


def test_doctor_skims_a_text_with_each_model_and_reports_what_cannot_be_read(capsys):
    assert doctor.main([str(tiny_model()), __file__]) == 1
    here, model, broken = map(json.loads, capsys.readouterr().out.splitlines())
    assert here["ok"] and here["backend"] == "cpu" and here["cores"] >= 1
    assert model["ok"] and model["tokens_per_s"] > 0
    assert model["backend"] == "cpu" and model["reason"] and len(model["lines"]) == 1
    assert 0 < model["kept_tokens"] <= 0.1 * model["prompt_tokens"]
    assert not broken["ok"] and "not a GGUF" in broken["lines"][0]


def test_doctor_without_a_model_says_where_passes_run(capsys):
    assert doctor.main([]) == 0
    (report,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "CPU" in report["lines"][0]


def test_doctor_says_why_a_model_stays_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch, capsys):
    def too_large(path: Path, **options: object) -> NoReturn:
        raise Busy("the GPU has too little free memory for loading it")

    gpu = {"backend": "cuda", "reason": "", "devices": [{"name": "Test GPU"}]}
    monkeypatch.setattr(doctor, "examine_kernels", lambda: gpu)
    monkeypatch.setattr(drafter, "examine_kernels", lambda: gpu)
    monkeypatch.setattr(drafter.CudaBackend, "open", too_large)
    assert doctor.main([str(tiny_model())]) == 0
    here, model = map(json.loads, capsys.readouterr().out.splitlines())
    assert here["backend"] == "cuda" and "Test GPU" in here["lines"][0]
    assert model["backend"] == "cpu" and model["ok"]
    assert model["lines"][1].endswith("the CPU: the GPU has too little free memory for loading it")


def test_doctor_reports_a_bad_setting(monkeypatch, capsys):
    monkeypatch.setenv("SKIM_DRAFTER_ALPHA", "7")
    assert doctor.main([str(tiny_model())]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "SKIM_DRAFTER_ALPHA" in report["lines"][0]
