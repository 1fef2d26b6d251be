"""The attention benchmark runs on the emulator, and counts what it says it counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import gpu_options, torch_attention
from bench.attention import main
from bench.attention_layer import Layer, Shape, listed_flops
from bench.planted import plant
from kernels.device import Device
from kernels.reference import BlockRule
from tests.emulator.device import EmulatedDevice
from tests.tools import require_tool

SHAPE = Shape(num_heads=2, num_kv_heads=1, head_dim=64)


def flops_pair_by_pair(num_tokens: int, density: float) -> float:
    num_tiles = -(-num_tokens // 128)
    lists = plant(density, SHAPE.num_heads, num_tiles, BlockRule())
    pairs = 0
    for head in range(SHAPE.num_heads):
        for i in range(num_tokens):
            listed = np.isin(np.arange(i + 1) // 128, lists.row(head, i // 128))
            pairs += int(np.count_nonzero(listed))
    return 4.0 * SHAPE.head_dim * pairs


def test_useful_operations_are_those_of_the_listed_pairs() -> None:
    lists = plant(0.3, SHAPE.num_heads, 11, BlockRule())
    assert lists.density < 1
    assert listed_flops(SHAPE, 1300, lists) == flops_pair_by_pair(1300, 0.3)


def test_dense_operations_are_those_of_every_causal_pair() -> None:
    assert listed_flops(SHAPE, 300, None) == 4.0 * 64 * 2 * (300 * 301 // 2)


def test_queries_are_put_back_bit_for_bit(device: Device) -> None:
    layer = Layer(device, SHAPE, 300)
    before = layer.output(300)
    layer.attention("portable", dense=True, full_tiles=0)()
    assert not np.array_equal(layer.output(300), before)
    layer.restore()
    assert np.array_equal(layer.output(300), before)
    layer.close()


def test_rows_of_both_paths_and_a_sweep(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tool("g++")
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    monkeypatch.setattr("bench.attention.variants", lambda head_dim: {})
    monkeypatch.setattr(torch_attention, "why_not", lambda: "torch is not asked here")
    given = (
        "--tokens 1100 --densities 0.3,dense --heads 2 --kv-heads 1 --head-dim 64 --launches 1 "
        "--portable-launches 1 --torch-tokens 1100 --sweep"
    )
    assert main(given.split(), lambda: EmulatedDevice("sm_90a")) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["path"], row["asked_density"]) for row in summary["rows"]] == [
        ("hopper", 0.3),
        ("portable", 0.3),
        ("hopper", None),
        ("portable", None),
    ]
    apart = [row["furthest_from_hopper"] for row in summary["rows"][1::2]]
    assert max(apart) < 2**-5  # of values below 4, each path rounds weights and output to bf16
    assert summary["commit"] == "abc1234"
    assert 0 < summary["rows"][0]["finding_share"] < 1
    assert summary["left_out"] == ["PyTorch dense 1,100: torch is not asked here"]


def test_commit_is_the_checkouts_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    monkeypatch.setattr(
        gpu_options.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="a1\n")
    )
    assert gpu_options.commit() == "a1"
    monkeypatch.setenv("GIT_COMMIT", "b2")
    assert gpu_options.commit() == "b2"


def test_commit_is_empty_outside_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    monkeypatch.setattr(gpu_options, "ROOT", tmp_path)
    assert gpu_options.commit() == ""
