"""Keeps the outcome of each prompt of the retrieval table in a file, so that a run can be resumed.

The file's first line holds the variants and the models' digests; a file made with others is
refused, since its rows would mean something else. Each further line is one prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from bench.retrieval_cases import Cell


@dataclass(frozen=True)
class Outcome:
    """What came of one prompt; variants are named by their place in the run's list."""

    cell: Cell
    seed: int
    gold: tuple[bool, ...]  # by variant: every asked needle kept
    density: float
    full: bool | None  # answered right from the whole prompt; None: not asked
    skim: dict[int, bool]  # by variant: answered right from the kept spans


class Record:
    """Outcomes by cell and seed, in memory and, with a path, in a file.

    Raises:
        ValueError: the file was made with other variants or other models.
    """

    def __init__(self, path: Path | None, setting: Any, models: Sequence[Path]) -> None:
        digests = {model.name: hashlib.sha256(model.read_bytes()).hexdigest() for model in models}
        head = json.loads(json.dumps({"variants": setting, "models": digests}))
        self.outcomes: dict[tuple[Cell, int], Outcome] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a run killed while writing leaves half a line
        if whole != text:
            path.write_text(whole)
        lines = whole.splitlines()
        if lines and json.loads(lines[0]) != head:
            raise ValueError(f"{path} was made with other variants or models; name another file")
        for line in lines[1:]:
            self._keep(_parse(json.loads(line)))
        self._file = path.open("a", buffering=1)
        if not lines:
            self._file.write(json.dumps(head) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, outcome: Outcome) -> None:
        """Take in one outcome, and write it down at once."""
        self._keep(outcome)
        if self._file is not None:
            cell = [outcome.cell.size, outcome.cell.task, outcome.cell.question_above]
            entry = vars(outcome) | {"cell": cell}
            self._file.write(json.dumps(entry) + "\n")

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes[outcome.cell, outcome.seed] = outcome


def _parse(entry: dict[str, Any]) -> Outcome:
    size, task, above = entry["cell"]
    return Outcome(
        cell=Cell(size, task, above),
        seed=entry["seed"],
        gold=tuple(entry["gold"]),
        density=entry["density"],
        full=entry["full"],
        skim={int(index): right for index, right in entry["skim"].items()},
    )
