"""What the commands print: text for people, or one JSON object as the last line.

With `--json` standard output carries JSON alone and the text goes to standard error. Errors of
Skim's own tree become one red line with field, got, allowed and a hint, and exit code 2; a stack
trace is for defects only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from skim import errors
from skim.errors import SkimError

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

# What to do about an error, by its reason, else by its class.
HINTS_BY_REASON = {
    "ADDRESS_UNAVAILABLE": "stop what listens there, or choose other ports: skim up --port 0",
    "GATEWAY_UNREACHABLE": "start the services with `skim up`, or add --local",
    "SERVICE_UNREACHABLE": "start the services with `skim up`",
    "BUNDLED_MODEL_MISSING": "name your own files with --target and --drafter",
    "MODEL_NOT_FOUND": "`skim models` lists what is served",
    "NO_MEMORY_PLANE": "set memory_socket for target and drafter, on one GPU",
    "REGION_NOT_FOUND": "`skim memory list` shows the drafters that are attached",
    "GENERATION_MISMATCH": "look again with `skim memory list`",
    "DRAINING": "the services are stopping; start them again with `skim up`",
    "FULL_PREFILL_IMPOSSIBLE": "give the target more memory, or ask without --full",
}
HINTS_BY_CLASS: tuple[tuple[type[SkimError], str], ...] = (
    (errors.ModelFileError, "is the file complete? `skim doctor` reads it and says what is wrong"),
    (errors.Unauthenticated, "pass the gateway's token with --token or SKIM_TOKEN"),
    (errors.DeadlineExceeded, "allow more time with --timeout"),
    (errors.EngineFault, "the service's log has the details; `skim doctor` checks the set-up"),
)


class Output:
    """Where one command writes.

    Args:
        as_json: the last line of standard output is one JSON object, and nothing else is there.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.console = Console(stderr=as_json, highlight=False)
        self._stderr = Console(stderr=True, highlight=False)

    @property
    def lively(self) -> bool:
        """Whether progress bars make sense: a person watches a terminal."""
        return self.console.is_terminal and not self.as_json

    def json_line(self, value: dict[str, Any]) -> None:
        """Print one JSON object on one line of standard output, with `--json` only."""
        if self.as_json:
            print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)

    def error(self, error: SkimError) -> None:
        """Print an error as one red line, and as JSON with `--json`."""
        line = Text("error: ", style="bold red").append(describe(error), style="red")
        self._stderr.print(line, soft_wrap=True)
        found = {"message": error.message, "reason": error.reason, "field": error.field}
        self.json_line({"error": {**found, "hint": hint(error), **error.metadata}})


def describe(error: SkimError) -> str:
    """One line: the message, then field, got and allowed where it does not say them, and a hint."""
    message = " ".join(error.message.split())
    facts = {"field": error.field, **error.metadata}
    missing = [f"{k} {v}" for k, v in facts.items() if v and str(v) not in message]
    line = f"{message} ({', '.join(missing)})" if missing else message
    advice = hint(error)
    return f"{line}. {advice[0].upper()}{advice[1:]}." if advice else line


def hint(error: SkimError) -> str:
    """What the user can do about it; empty when there is nothing to say."""
    if isinstance(error, errors.Busy) and error.retry_after_s is not None:
        return f"try again in {error.retry_after_s:.1f} s"
    by_class = (text for cls, text in HINTS_BY_CLASS if isinstance(error, cls))
    return HINTS_BY_REASON.get(error.reason) or next(by_class, "")


def run_command(as_json: bool, body: Callable[[Output], int]) -> None:
    """Run a command's body and end the process with the exit code that belongs to its end."""
    output = Output(as_json)
    try:
        code = body(output)
    except SkimError as error:
        output.error(error)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        output.json_line({"error": {"message": "interrupted", "reason": "CANCELLED"}})
        code = EXIT_INTERRUPTED
    if code:
        raise typer.Exit(code)
