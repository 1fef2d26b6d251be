"""The picture of `bench.ttft`: what is drawn, not how it looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.ttft_plot import COLOURS, draw, grouped, main
from bench.ttft_record import STAGES, Record, summarise
from tests.unit.test_bench_ttft_record import sample, vanilla

EVENTS = [
    sample(1000, 2.0),
    sample(1000, 2.5, mode="park"),
    sample(4000, 3.0),
    vanilla(1000, 20.0),
    vanilla(4000, 60.0),
]


def test_drawn_stages_add_up_to_those_measured() -> None:
    stages = {stage: 2.0**n for n, stage in enumerate(STAGES)}
    drawn = grouped(stages)
    assert sum(drawn.values()) == sum(stages.values())
    assert drawn.keys() <= COLOURS.keys()


def test_each_length_gets_a_bar_for_llama_cpp_and_one_for_each_mode() -> None:
    figure = draw(summarise(EVENTS), lists="planted 0.05", keep=0.05)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [
        "4,000 resident, 20.0x",
        "4,000 llama.cpp",
        "1,000 park, 8.0x",
        "1,000 resident, 10.0x",
        "1,000 llama.cpp",
    ]


def test_a_record_becomes_a_file(tmp_path: Path) -> None:
    record = Record(tmp_path / "run.jsonl")
    for event in EVENTS:
        record.add(**event)
    picture = tmp_path / "ttft.svg"
    assert main([str(tmp_path / "run.jsonl"), "--out", str(picture)]) == 0
    assert picture.read_text().startswith("<?xml")


def test_records_without_the_wanted_row_are_refused() -> None:
    with pytest.raises(ValueError, match="no row of natural at keep 0.5"):
        draw(summarise(EVENTS), lists="natural", keep=0.5)
