"""What people and programs read: one red line an error, JSON as the last line, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import typer

from skim.cli.output import Output, describe, hint, run_command
from skim.errors import Busy, ConfigError, InvalidRequest, ModelFileError, SkimError
from skim.rpc_errors import STATUS_CODES


def ends_with(body: Callable[[Output], int], *, as_json: bool = False) -> int:
    try:
        run_command(as_json, body)
    except typer.Exit as end:
        return end.exit_code
    return 0


def raising(error: BaseException) -> Callable[[Output], int]:
    def body(output: Output) -> int:
        raise error

    return body


def test_message_that_says_everything_is_not_repeated() -> None:
    error = InvalidRequest.field_value("keep_ratio", 2.0, "in (0, 1]")
    assert describe(error) == "keep_ratio must be in (0, 1], got 2.0"


def test_field_and_limits_are_added_where_the_message_lacks_them() -> None:
    error = InvalidRequest("that will not do", field="seed", got=-1, allowed="0 and more")
    assert describe(error) == "that will not do (field seed, got -1, allowed 0 and more)"


def test_port_in_use_comes_with_what_to_do() -> None:
    error = ConfigError("the port is in use", reason="ADDRESS_UNAVAILABLE")
    assert describe(error).endswith(
        "Stop what listens there, or choose other ports: skim up --port 0."
    )


def test_busy_repeats_the_measured_hint() -> None:
    assert hint(Busy("full", retry_after_s=1.25)) == "try again in 1.2 s"


def test_message_of_several_lines_becomes_one() -> None:
    assert "\n" not in describe(SkimError("first\n   second"))


@pytest.mark.parametrize("cls", [cls for cls, _ in STATUS_CODES] + [ConfigError])
def test_every_error_of_the_tree_ends_in_exit_code_2(
    cls: type[SkimError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends_with(raising(cls("no"))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: no")
    assert err.count("\n") == 1


def test_json_error_is_the_last_line_and_names_the_field(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = ModelFileError("cut short", field="target", got="77 bytes")
    assert ends_with(raising(error), as_json=True) == 2
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)["error"]
    assert (found["message"], found["field"], found["got"]) == ("cut short", "target", "77 bytes")


def test_interrupt_ends_in_exit_code_130() -> None:
    assert ends_with(raising(KeyboardInterrupt())) == 130


def test_defect_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        ends_with(raising(ZeroDivisionError()))


def test_text_leaves_standard_output_to_json(capsys: pytest.CaptureFixture[str]) -> None:
    def body(output: Output) -> int:
        output.console.print("for people")
        output.json_line({"a": 1})
        return 0

    assert ends_with(body, as_json=True) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ('{"a": 1}\n', "for people\n")
