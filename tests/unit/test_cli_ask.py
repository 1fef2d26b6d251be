"""What `skim ask` and `skim demo` read and tell, without any service."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from skim.cli.app import app, given
from skim.cli.ask import answer_object, summary
from skim.cli.demo import DemoOptions, demo_object, run_demo, speedup
from skim.cli.document import read_document
from skim.cli.output import Output
from skim.cli.stack_plan import StackOptions
from skim.cli.tables import format_seconds, timing_table
from skim.client_types import Admitted, Answer, Finish, Plan, Timings, Usage
from skim.demo_document import DemoDocument
from skim.errors import InvalidRequest
from skim.spans import Span

TIMINGS = Timings(0.1, 0.0, 0.0, 0.5, 0.01, 0.0, 0.0, 0.25, 0.9, 2.0, 0.0, 3.0)
USAGE = Usage(1_000, 100, 21, 7, 5, 10, 4_000)
PLAN = Plan(
    skimmed=True,
    full_reason="",
    detail="",
    degraded=False,
    drafter_prompt_tokens=990,
    drafter_kept_tokens=99,
    coverage=0.875,
    density=0.125,
    layer_density=(0.1, 0.15),
    cut_row_share=0.0,
    forced_only=False,
    yarn_factor=1.0,
    spans=(Span(0, 400),),
    scorer="specprefill",
)
ANSWER = Answer(
    text="It is 1234567.",
    token_ids=(1, 2),
    logprobs=(),
    admitted=Admitted("r-1", "big", "small"),
    plan=PLAN,
    finish=Finish("eos", USAGE, TIMINGS, 1.0, 3.1, 0, "compacted", "ngram"),
)


def as_text(table: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_one_file_is_the_document_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("naïve\r\n".encode())
    assert read_document([str(file)]) == "naïve\r\n"


def test_several_files_are_joined_under_their_names_in_order(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("b.txt", "a.txt")]
    for name in names:
        Path(name).write_text(f"text of {name[-5]}")
    expected = f"# {names[0]}\n\ntext of b\n\n# {names[1]}\n\ntext of a"
    assert read_document(names) == expected


def test_file_that_is_not_utf8_is_refused_at_its_first_bad_byte(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(InvalidRequest, match="invalid byte 0xe9 at offset 3") as caught:
        read_document([str(file)])
    assert caught.value.reason == "INVALID_UTF8"


def test_document_of_whitespace_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(" \n")
    with pytest.raises(InvalidRequest, match="whitespace"):
        read_document([str(file)])


def test_summary_of_a_skim_gives_share_coverage_density_and_rate() -> None:
    assert summary(ANSWER) == (
        "kept 100 of 1,000 tokens (10.0%), coverage 0.88, density 0.125, scorer specprefill, "
        "21 tokens out, 10 a second"
    )


def test_summary_of_a_full_prefill_gives_its_reason_in_words() -> None:
    plan = replace(PLAN, skimmed=False, full_reason="drafter_failed")
    said = summary(replace(ANSWER, plan=plan))
    assert said.startswith("read all 1,000 tokens (the drafter failed)")


def test_json_of_an_answer_can_be_written_and_counts_in_the_targets_tokens() -> None:
    found = json.loads(json.dumps(answer_object(ANSWER), allow_nan=False))
    assert found["keep_ratio"] == 0.1
    assert found["spans"] == [[0, 400]]
    assert found["timings"]["ttft_s"] == found["ttft_s"] == 1.0


def test_timing_table_leaves_out_stages_that_ran_in_no_column() -> None:
    text = as_text(timing_table({"a": {"score_s": 0.5}, "b": {"prefill_s": 2.0}}))
    assert "skim and score" in text and "prefill" in text
    assert "unpark" not in text


def test_seconds_read_as_milliseconds_below_one() -> None:
    assert [format_seconds(s) for s in (0.00042, 0.5, 1.0)] == ["0.42 ms", "500 ms", "1.00 s"]


def test_options_that_were_not_given_are_left_to_the_server() -> None:
    assert given(temperature=0.0, seed=None, mode="auto") == {"temperature": 0.0, "mode": "auto"}


def test_full_and_skim_exclude_each_other(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["ask", "What?", "--file", "-", "--full", "--skim"])
    assert result.exit_code == 2
    assert "exclude each other" in result.output


def test_empty_question_is_refused_before_anything_is_reached(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("A book.")
    result = CliRunner().invoke(app, ["ask", " ", "--file", str(file)])
    assert result.exit_code == 2
    assert "question must be a text" in result.output


@pytest.mark.parametrize(("tokens", "ratio"), [(16_384, 0.05), (8_192, 0.05), (8_191, 0.1)])
def test_demo_keeps_more_of_short_documents(tokens: int, ratio: float) -> None:
    assert DemoOptions(tokens).keep_ratio == ratio


def test_demo_keeps_what_it_is_told_to() -> None:
    assert DemoOptions(4_096, keep=0.5).keep_ratio == 0.5


def test_demo_refuses_a_document_in_which_nothing_can_be_hidden() -> None:
    with pytest.raises(InvalidRequest, match="tokens must be 4,096 to"):
        run_demo(Output(), DemoOptions(tokens=1_000), StackOptions())


def test_demo_object_compares_the_two_first_tokens() -> None:
    demo = DemoDocument("text of some length", "?", "1234567", 5, 9)
    slow = replace(ANSWER, text="?", finish=replace(ANSWER.finish, ttft_s=12.0))
    answers = {"skim": ANSWER, "full": slow}
    found = demo_object(DemoOptions(), demo, answers)
    assert found["speedup"] == speedup(answers) == 12.0
    assert (found["correct"], found["correct_full"]) == (True, False)
