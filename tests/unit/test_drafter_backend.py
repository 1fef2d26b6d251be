"""What a score request refuses, how a run's rotary scaling is chosen, how work is shared out."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from drafter_svc.architecture import scaling_for
from drafter_svc.backend import AttentionConfig, ScoreInput
from drafter_svc.cpu_pool import WorkPool
from skim.errors import Cancelled, InvalidRequest
from tests.fixtures.planted_drafter import planted_drafter

IDS = np.arange(100, dtype=np.int32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("alpha", 1.1),
        ("max_density", 0.0),
        ("max_density", float("nan")),
        ("window_blocks", 0),
        ("sink_blocks", -1),
        ("last_full_blocks", -1),
        ("dense_below_tokens", -1),
        ("block_tokens", 100),
    ],
)
def test_attention_settings_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AttentionConfig(**{field: value})
    assert caught.value.field == f"attention.{field}"
    assert caught.value.metadata["got"] == repr(value)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("ids", {"ids": np.empty(0, dtype=np.int32)}),
        ("ids", {"ids": IDS.astype(np.int64)}),
        ("ids", {"ids": IDS.reshape(10, 10)}),
        ("query", {"query_tokens": (5, 5)}),
        ("query", {"query_tokens": (-1, 5)}),
        ("query", {"query_tokens": (90, 101)}),
        ("scorer", {"scorer": "guess"}),
        ("chunk_tokens", {"chunk_tokens": 0}),
        ("pool_kernel", {"pool_kernel": 12}),
        ("lookahead_tokens", {"lookahead_tokens": -1}),
        ("lookahead_tokens", {"lookahead_tokens": 65}),
    ],
)
def test_score_requests_out_of_range_are_refused_by_name(
    field: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ScoreInput(**{"ids": IDS, **options})
    assert caught.value.field == field


def test_no_scaling_within_the_trained_context() -> None:
    shape = planted_drafter([{}]).shape
    assert scaling_for(shape, shape.context_length).kind == "none"


def test_yarn_is_just_wide_enough_past_the_trained_context() -> None:
    shape = planted_drafter([{}]).shape
    scaling = scaling_for(shape, 3 * shape.context_length)
    assert (scaling.kind, scaling.factor) == ("yarn", 3.0)
    assert scaling.original_context == shape.context_length


def test_the_files_own_yarn_holds_until_its_range_is_passed() -> None:
    shape = planted_drafter([{}]).shape
    rope = replace(shape.rope, kind="yarn", factor=4.0, original_context=32_768)
    shape = replace(shape, rope=rope, context_length=131_072)
    assert scaling_for(shape, 1000).factor == 4.0
    assert scaling_for(shape, 131_072).factor == 4.0
    assert scaling_for(shape, 262_144).factor == 8.0


def test_the_pool_does_every_piece_once() -> None:
    pool, done = WorkPool(3), []
    pool.run(50, lambda piece, worker: done.append(piece), threading.Event())
    pool.close()
    assert sorted(done) == list(range(50))


def test_the_pool_raises_what_a_piece_raised_and_serves_again() -> None:
    pool = WorkPool(2)

    def work(piece: int, worker: int) -> None:
        if piece == 3:
            raise ValueError("piece 3")

    with pytest.raises(ValueError, match="piece 3"):
        pool.run(10, work, threading.Event())
    pool.run(10, lambda piece, worker: None, threading.Event())
    pool.close()


def test_the_pool_is_quiet_once_it_has_raised() -> None:
    """A thread that still worked would write into the next request's buffers."""
    pool, running, stop = WorkPool(2), threading.Semaphore(0), threading.Event()
    active: list[int] = []

    def work(piece: int, worker: int) -> None:
        active.append(piece)
        if piece == 0:
            running.acquire(timeout=10)  # until the other thread has set the stop
        else:
            stop.set()
            running.release()
        active.remove(piece)

    with pytest.raises(Cancelled):
        pool.run(100, work, stop)
    assert active == []
    pool.close()
