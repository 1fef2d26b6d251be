"""Where a pass of the CUDA backend pauses for others, and that pauses change nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from drafter_svc.backend import ScoreInput
from drafter_svc.pacing import Pacer
from skim.errors import Cancelled
from tests.fixtures.cuda_backend import SPARSE, Machine, machine, model, prompt, run

__all__ = ["machine"]

LAYERS, CHUNKS = 3, 3  # 300 tokens in chunks of 128 rows
REQUEST = ScoreInput(prompt(300, seed=4), attention=SPARSE)


def test_pass_may_pause_between_layers_around_attention_and_between_chunks_of_rows(
    machine: Machine, tmp_path: Path
) -> None:
    backend, pauses = machine.cuda(model(tmp_path, layers=LAYERS), chunk_rows=128), []
    unpaced = run(backend, REQUEST)
    backend.pacer = Pacer(0.0, 0.5, lambda: True, pause=lambda stop, s: pauses.append(s))
    paced = run(backend, REQUEST)
    whole_layer = 2 * (CHUNKS - 1) + 2  # projections and feed-forward, then attention
    last_layer = CHUNKS - 1  # its keys alone
    assert len(pauses) == (LAYERS - 1) * (1 + whole_layer) + last_layer
    np.testing.assert_array_equal(paced.scores, unpaced.scores)


def test_pass_does_not_pause_while_nobody_decodes(machine: Machine, tmp_path: Path) -> None:
    backend, pauses = machine.cuda(model(tmp_path, layers=2)), []
    backend.pacer = Pacer(0.0, 0.5, lambda: False, pause=lambda stop, s: pauses.append(s))
    run(backend, REQUEST)
    assert pauses == []


def test_pass_stopped_in_a_pause_ends_at_once(machine: Machine, tmp_path: Path) -> None:
    backend, stop = machine.cuda(model(tmp_path, layers=2)), threading.Event()
    pauses = []

    def pause(stopped: threading.Event, seconds: float) -> None:
        pauses.append(seconds)
        stop.set()
        assert stopped.wait(seconds)  # would take an hour

    backend.pacer = Pacer(0.0, 3_600.0, lambda: True, pause=pause)
    with pytest.raises(Cancelled):
        backend.score(REQUEST, stop=stop, progress=lambda done, total: None)
    assert pauses
