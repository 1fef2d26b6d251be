"""The retrieval table's record: resuming, a torn line, another setting."""

from __future__ import annotations

import pytest

from bench.retrieval import row
from bench.retrieval_cases import Cell
from bench.retrieval_record import Outcome, Record
from bench.retrieval_scoring import Variant

CELL = Cell(8192, "niah_single", False)
SETTING = [{"scorer": "specprefill", "keep_ratio": 0.1}]


def outcome(seed: int) -> Outcome:
    return Outcome(CELL, seed, (True, False), 0.25, True, {0: True, 1: False})


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def test_outcomes_come_back_as_they_were_added(tmp_path, model):
    path = tmp_path / "record.jsonl"
    with Record(path, SETTING, [model]) as record:
        record.add(outcome(1))
        record.add(outcome(2))
    with Record(path, SETTING, [model]) as record:
        assert list(record.outcomes.values()) == [outcome(1), outcome(2)]


def test_half_a_line_of_a_killed_run_is_dropped_and_written_over(tmp_path, model):
    path = tmp_path / "record.jsonl"
    with Record(path, SETTING, [model]) as record:
        record.add(outcome(1))
    path.write_text(path.read_text() + '{"cell": [81')
    with Record(path, SETTING, [model]) as record:
        assert list(record.outcomes.values()) == [outcome(1)]
        record.add(outcome(2))
    with Record(path, SETTING, [model]) as record:
        assert list(record.outcomes.values()) == [outcome(1), outcome(2)]


def test_record_of_other_variants_or_models_is_refused(tmp_path, model):
    path = tmp_path / "record.jsonl"
    Record(path, SETTING, [model]).__exit__(None, None, None)
    with pytest.raises(ValueError, match="other variants or models"):
        Record(path, [], [model])
    model.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="other variants or models"):
        Record(path, SETTING, [model])


def test_without_a_path_outcomes_stay_in_memory():
    with Record(None, SETTING, []) as record:
        record.add(outcome(1))
        assert record.outcomes[CELL, 1] == outcome(1)


def test_row_pairs_skim_with_full_and_counts_gold():
    outcomes = [
        Outcome(CELL, 1, (True,), 0.5, True, {0: True}),
        Outcome(CELL, 2, (False,), 0.5, True, {0: False}),
        Outcome(CELL, 3, (True,), 0.5, None, {}),
        Outcome(Cell(8192, "niah_multikey", False), 1, (False,), 0.5, False, {0: False}),
    ]
    line = row(CELL, Variant("specprefill", "same", 0.1), 0, outcomes)
    assert (line["n"], line["gold_recall"], line["density"]) == (3, 2 / 3, 0.5)
    assert (line["answered_n"], line["full_accuracy"], line["skim_accuracy"]) == (2, 1.0, 0.5)
    assert line["skim_minus_full"][0] == -0.5


def test_row_without_full_answers_has_no_difference():
    outcomes = [Outcome(CELL, seed, (True,), 0.0, None, {0: seed == 1}) for seed in (1, 2)]
    line = row(CELL, Variant("specprefill", "same", 0.1), 0, outcomes)
    assert (line["answered_n"], line["full_accuracy"], line["skim_accuracy"]) == (2, None, 0.5)
    assert "skim_minus_full" not in line
