"""modelfile.doctor: one JSON line a file, problems named, never a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modelfile.doctor import examine, main
from tests.fixtures.tiny_gguf import CHAT_TEMPLATE, write_tiny_gguf


def test_healthy_file_is_described_in_full(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf", chat_template=CHAT_TEMPLATE)
    report = examine(str(path))
    assert report["ok"]
    assert report["problems"] == []
    assert report["drafter"]
    assert report["shape"]["layers"] == 2
    assert report["tokenizer"]["vocab_size"] == 645
    assert report["template"]["streamable"]
    assert len(report["model_digest"]) == len(report["layout_digest"]) == 64


def test_model_for_llama_cpp_alone_is_healthy_but_no_drafter(tmp_path: Path) -> None:
    report = examine(str(write_tiny_gguf(tmp_path / "t.gguf", arch="qwen3vl", head_dim=64)))
    assert report["ok"]
    assert not report["drafter"]
    assert report["template"] is None


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (b"GGUF", b"GGML", "not a GGUF"),
        (b"tokenizer.ggml.model", b"tokenizer.ggml.modem", "tokenizer.ggml.model"),
        (b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight", "blk.1.ffn_up.weight"),
        (b"{% for message", b"{% xor message", "does not parse"),
    ],
)
def test_problem_is_named(tmp_path: Path, before: bytes, after: bytes, problem: str) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf", chat_template=CHAT_TEMPLATE)
    path.write_bytes(path.read_bytes().replace(before, after, 1))
    report = examine(str(path))
    assert not report["ok"]
    assert problem in "".join(report["problems"])


def test_template_that_cannot_be_streamed_is_told_but_no_problem(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf", chat_template="{{ messages[0].content }}")
    report = examine(str(path))
    assert report["ok"]
    assert not report["template"]["streamable"]
    assert "exactly once" in report["template"]["why"]


def test_command_prints_one_line_a_file_and_fails_when_one_is_broken(tmp_path: Path) -> None:
    good = write_tiny_gguf(tmp_path / "t.gguf", rope_freqs=[1.0] * 16, arch="llama")
    command = [sys.executable, "-m", "modelfile.doctor", str(good), str(tmp_path / "none")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["ok"] for line in lines] == [True, False]
    assert run.returncode == 1
    assert run.stderr == ""


def test_all_healthy_gives_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_tiny_gguf(tmp_path / "t.gguf"))]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
