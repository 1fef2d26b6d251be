"""The benchmark of opening a large vocabulary opens the vocabulary that it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.open_vocabulary import STAGES, main, write_vocabulary
from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer


def test_file_has_the_entries_and_as_many_merges_as_they_need(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "v.gguf", entries=1_000, seed=1)
    with GgufFile.open(tmp_path / "v.gguf") as file:
        tokenizer = Tokenizer.from_gguf(file)
        merges = len(file.strings("tokenizer.ggml.merges"))
    assert (tokenizer.vocab_size, merges) == (1_000, 1_000 - 256 - 3)
    assert all(tokenizer.token_bytes(token) for token in range(1_000 - 3))


def test_last_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--entries", "1000", "--n", "3", "--json"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["bench"], summary["entries"], summary["n"]) == ("open_vocabulary", 1_000, 3)
    for stage in STAGES:
        times = summary[f"{stage}_s"]
        assert 0.0 < times["median"] <= times["worst"] and times["first"] <= times["worst"]
