"""What follows from the samples of `bench.ttft`: stages, rows, ratios, break-even."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.ttft_record import (
    STAGES,
    Event,
    Record,
    break_even,
    read_records,
    stages_of,
    summarise,
    table,
)
from skim.client_types import Admitted, Answer, Finish, Plan, Timings, Usage

TIMINGS = Timings(
    upload_s=0.1,
    queue_s=0.02,
    tokenise_s=0.3,
    score_s=0.5,
    select_s=0.01,
    park_s=0.03,
    map_s=0.04,
    prefill_s=2.0,
    ttft_s=2.7,
    decode_s=1.0,
    unpark_s=0.05,
    total_s=4.0,
)


def answer(ttft_s: float) -> Answer:
    plan = Plan(True, "", "", False, 9, 1, None, 0.1, (), 0.0, False, 1.0, None, "specprefill")
    usage = Usage(9, 1, 1, 0, 0, 1, 40)
    finish = Finish("length", usage, TIMINGS, ttft_s, 4.1, 0, "original", "")
    return Answer("x", (1,), (), Admitted("id", "target", "drafter"), plan, finish)


def sample(tokens: int, ttft_s: float, **changes: Any) -> Event:
    stages = dict.fromkeys(STAGES, 0.0) | {"prefill": ttft_s - 0.25, "upload": 0.2, "rest": 0.05}
    return {
        "kind": "sample",
        "mode": "resident",
        "path": "skim",
        "lists": "planted 0.05",
        "keep": 0.05,
        "tokens": tokens,
        "ttft_s": ttft_s,
        "stages_s": stages,
        "target_tokenise_s": 0.0,
        "kept_tokens": tokens / 20,
        "density": 0.05,
        "prompt_bytes": 4 * tokens,
        "forced_only": False,
        **changes,
    }


def full(tokens: int, ttft_s: float) -> Event:
    return sample(tokens, ttft_s, path="full", lists="", keep=None, kept_tokens=tokens)


def vanilla(tokens: int, ttft_s: float) -> Event:
    return {"kind": "vanilla", "tokens": tokens, "ttft_s": ttft_s, "first_token": 0}


def test_stages_of_a_skimmed_request_add_up_to_the_client_s_time() -> None:
    scored = {"tokenise_s": 0.06, "forward_s": 0.35, "select_s": 0.01}
    stages = stages_of(answer(2.8), scored)
    assert tuple(stages) == STAGES
    assert sum(stages.values()) == pytest.approx(2.8)
    assert (stages["tokenise"], stages["score"], stages["unpark"]) == (0.06, 0.35, 0.05)
    assert stages["rest"] == pytest.approx(2.8 - 0.1 - 0.06 - 0.05 - 0.02 - 0.36 - 0.04 - 2.03)


def test_stages_of_a_full_request_take_the_target_s_tokenising() -> None:
    stages = stages_of(answer(2.8), None)
    assert (stages["tokenise"], stages["score"], stages["select"]) == (0.3, 0.0, 0.0)


def test_rows_are_medians_over_samples_with_the_ratio_to_llama_cpp_at_their_length() -> None:
    events = [sample(1000, s) for s in (3.0, 1.0, 2.0)] + [vanilla(1000, s) for s in (30.0, 50.0)]
    summary = summarise([*events, vanilla(2000, 7.0)])
    (row,) = summary["rows"]
    assert row["ttft_s"] == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    assert row["times_faster"] == 20.0
    assert (row["kept_share"], row["added_s"]) == (0.05, pytest.approx(0.25))
    assert row["stages_s"]["prefill"] == 1.75


def test_samples_of_other_modes_lists_or_keeps_are_other_rows() -> None:
    kinds = [{}, {"mode": "park"}, {"lists": "natural"}, {"keep": 0.1}, {"path": "full"}]
    assert len(summarise([sample(1000, 1.0, **kind) for kind in kinds])["rows"]) == len(kinds)


def test_break_even_lies_between_the_lengths_where_the_ratio_crosses_one() -> None:
    # Ratios 2 at 1,000 and 1/2 at 4,000: even at the geometric mean.
    assert break_even([(4000, 1.0, 2.0), (1000, 2.0, 1.0)]) == {
        "tokens": 2000,
        "bound": "measured",
    }


def test_break_even_is_after_the_last_length_at_which_full_was_faster() -> None:
    points = [(500, 1.0, 2.0), (1000, 2.0, 1.0), (4000, 1.0, 2.0)]
    assert break_even(points) == {"tokens": 2000, "bound": "measured"}


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([(500, 1.0, 2.0), (1000, 1.0, 3.0)], {"tokens": 500, "bound": "at_most"}),
        ([(500, 3.0, 2.0), (1000, 4.0, 3.0)], {"tokens": 1000, "bound": "above"}),
        ([], None),
    ],
)
def test_break_even_outside_the_lengths_is_a_bound(
    points: list[tuple[int, float, float]], found: Event | None
) -> None:
    assert break_even(points) == found


def test_break_even_compares_with_full_by_the_services_and_with_llama_cpp() -> None:
    events = [sample(1000, 2.0), sample(4000, 1.0), full(1000, 1.0), full(4000, 2.0)]
    found = summarise([*events, vanilla(1000, 4.0), vanilla(4000, 4.0)])["break_even"]
    assert [(f["against"], f["tokens"], f["bound"]) for f in found] == [
        ("full through the services", 2000, "measured"),
        ("llama.cpp", 1000, "at_most"),
    ]


def test_a_record_is_on_disk_after_each_event_and_its_torn_last_line_is_left_out(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.jsonl"
    record = Record(path)
    record.add("vanilla", tokens=1000, ttft_s=2.0)
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["vanilla"]
    with path.open("a") as out:
        out.write('{"kind": "sam')
    assert read_records([path]) == record.events


def test_the_table_names_what_was_left_out_and_what_failed() -> None:
    events = [
        sample(1000, 2.0),
        vanilla(1000, 30.0),
        {"kind": "left_out", "what": "all of park"},
        {"kind": "failed", "what": "a row", "error": "it broke"},
    ]
    lines = table(summarise(events)).splitlines()
    assert "15.0" in lines[1].split()
    assert lines[-2:] == ["left out: all of park", "failed: a row: it broke"]
