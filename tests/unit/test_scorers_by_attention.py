"""Scorers that read the drafter's attention, on drafters whose attention is planted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from drafter_svc.architecture import DrafterWeights
from drafter_svc.backend import ChunkScores, ScoreInput
from drafter_svc.cpu_backend import CpuBackend
from skim.errors import Cancelled, EngineFault, InvalidRequest
from tests.fixtures.planted_drafter import filler, planted_drafter

ASK, NEEDLE, OTHER = 1, 2, 3
Open = Callable[[DrafterWeights], CpuBackend]


@pytest.fixture
def open_backend() -> Iterator[Open]:
    opened: list[CpuBackend] = []

    def build(weights: DrafterWeights, **options: Any) -> CpuBackend:
        opened.append(CpuBackend(weights, num_threads=2, **options))
        return opened[-1]

    yield build
    for backend in opened:
        backend.close()


def score(backend: CpuBackend, ids: NDArray[np.int32], **options: Any) -> ChunkScores:
    request = ScoreInput(ids, **options)
    return backend.score(request, stop=threading.Event(), progress=lambda done, total: None)


def test_specprefill_ranks_the_chunk_that_the_question_looks_at_first(open_backend: Open) -> None:
    ids = filler(2000, seed=70)
    ids[-3], ids[777] = ASK, NEEDLE
    result = score(open_backend(planted_drafter([{ASK: NEEDLE}] * 2)), ids)
    assert int(result.scores.argmax()) == 777 // 32
    # One of 8 queries spreads all its mass over 13 tokens of the chunk, the others over the prompt.
    assert result.scores[777 // 32] == pytest.approx((1 / 32 + 7 / 2000) / 8, rel=0.01)
    assert result.scores.shape == (63,)
    assert result.num_queries == 8 and not result.query_copied


def test_specprefill_finds_what_any_layer_looks_at_and_mid_layer_only_the_middle_one(
    open_backend: Open,
) -> None:
    ids = filler(2000, seed=71)
    ids[-3], ids[300], ids[1500] = ASK, NEEDLE, OTHER
    backend = open_backend(planted_drafter([{ASK: OTHER}, {}, {ASK: NEEDLE}, {}, {}]))
    every = score(backend, ids).scores
    assert set(np.argsort(every)[-2:].tolist()) == {300 // 32, 1500 // 32}
    middle = score(backend, ids, scorer="mid_layer")
    assert int(middle.scores.argmax()) == 300 // 32
    assert middle.scores[1500 // 32] < middle.scores[300 // 32] / 5
    assert middle.layers_run == 3 and len(middle.density) == 2


def test_queries_stand_at_the_end_of_the_query_range(open_backend: Open) -> None:
    ids = filler(2000, seed=72)
    ids[1490], ids[300], ids[1200] = ASK, NEEDLE, OTHER
    ids[1480] = 4  # outside the last 8 tokens of the range
    backend = open_backend(planted_drafter([{ASK: NEEDLE, 4: OTHER}]))
    result = score(backend, ids, query_tokens=(1400, 1495))
    assert int(result.scores.argmax()) == 300 // 32
    assert result.scores[1200 // 32] < result.scores[300 // 32] / 5
    assert result.num_queries == 9  # the prompt's last token asks too
    assert score(backend, ids, query_tokens=(1400, 1495), last_token_query=False).num_queries == 8


def test_the_last_token_asks_beside_the_query(open_backend: Open) -> None:
    ids = filler(2000, seed=73)
    ids[-1], ids[300] = ASK, NEEDLE
    backend = open_backend(planted_drafter([{ASK: NEEDLE}]))
    with_last = score(backend, ids, query_tokens=(1700, 1720))
    without = score(backend, ids, query_tokens=(1700, 1720), last_token_query=False)
    assert int(with_last.scores.argmax()) == 300 // 32
    assert without.scores[300 // 32] < with_last.scores[300 // 32] / 5


def test_a_question_far_above_the_end_looks_at_the_document_below_it(open_backend: Open) -> None:
    ids = filler(3000, seed=74)
    ids[50], ids[2000] = ASK, NEEDLE
    backend = open_backend(planted_drafter([{ASK: NEEDLE}] * 2))
    result = score(backend, ids, query_tokens=(20, 52))
    assert result.query_copied
    assert result.scores.shape == (94,)  # the copy's own keys are not scored
    assert int(result.scores.argmax()) == 2000 // 32
    assert result.panel is not None
    np.testing.assert_allclose(result.panel.sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize(("distance", "copied"), [(1024, False), (1025, True)])
def test_the_question_is_copied_from_1025_tokens_before_the_end(
    open_backend: Open, distance: int, copied: bool
) -> None:
    ids = filler(1500, seed=75)
    end = ids.size - distance
    result = score(open_backend(planted_drafter([{}])), ids, query_tokens=(end - 10, end))
    assert result.query_copied is copied


def test_the_copy_changes_no_other_query(open_backend: Open) -> None:
    """The prompt's last token stands before the copy and must not see it."""
    ids = filler(2500, seed=76)
    ids[-1], ids[40] = ASK, NEEDLE
    backend = open_backend(planted_drafter([{ASK: NEEDLE}]))
    copied = score(backend, ids, query_tokens=(10, 60))
    assert copied.panel is not None
    last_token_row = copied.panel[0]  # ascending positions: the prompt's end comes first
    alone = score(backend, ids).panel
    assert alone is not None
    np.testing.assert_allclose(last_token_row, alone[-1], atol=1e-6)


def test_panel_rows_run_by_layer_group_and_query_and_sum_to_one(open_backend: Open) -> None:
    ids = filler(1000, seed=77)
    ids[-2], ids[100], ids[500] = ASK, NEEDLE, OTHER
    looks = [{}, {ASK: NEEDLE}, {}, {}, {ASK: OTHER}, {}]
    result = score(open_backend(planted_drafter(looks)), ids)
    assert result.panel is not None and result.panel.shape == (3 * 8, 32)
    np.testing.assert_allclose(result.panel.sum(axis=1), 1.0, atol=1e-5)
    asking = result.panel.reshape(3, 8, 32)[:, 6]
    # Each group is two layers, and one of the two looks at its needle with all its mass.
    assert asking[0, 100 // 32] == pytest.approx(0.5, abs=0.05)
    assert asking[2, 500 // 32] == pytest.approx(0.5, abs=0.05)
    assert asking[1].max() < 0.1


def test_lookahead_tokens_ask_too(open_backend: Open) -> None:
    """The drafter's tied output repeats its last token, so the generated token is ASK itself."""
    ids = filler(600, seed=78)
    ids[-1], ids[300] = ASK, NEEDLE
    weights = planted_drafter([{ASK: NEEDLE}])
    plain = score(open_backend(weights), ids)
    ahead = score(open_backend(weights), ids, lookahead_tokens=3)
    assert ahead.num_queries == plain.num_queries + 3
    # 1 of 8 queries looks at the needle, then 4 of 11; the other 7 look everywhere.
    flat = 7 / 600
    assert plain.scores[300 // 32] == pytest.approx((1 / 32 + flat) / 8, rel=0.01)
    assert ahead.scores[300 // 32] == pytest.approx((4 / 32 + flat) / 11, rel=0.01)
    assert ahead.panel is not None
    np.testing.assert_allclose(ahead.panel.sum(axis=1), 1.0, atol=1e-5)


def test_lookahead_stops_at_the_end_token(open_backend: Open) -> None:
    ids = filler(600, seed=79)
    ids[-1] = ASK
    backend = open_backend(planted_drafter([{}], end_id=ASK))
    assert score(backend, ids, lookahead_tokens=3).num_queries == 8


def test_lookahead_past_the_workspace_is_refused_with_limit_and_got() -> None:
    backend = CpuBackend(planted_drafter([{}]), num_threads=1, workspace_bytes=1 << 20)
    with pytest.raises(InvalidRequest) as caught:
        score(backend, filler(600, seed=80), lookahead_tokens=8)
    backend.close()
    assert caught.value.field == "lookahead_tokens"
    assert caught.value.metadata == {"limit": str(1 << 20), "got": str(2 * 4 * 256 * 608)}


def test_progress_counts_layers_up_to_the_last_scored_one(open_backend: Open) -> None:
    seen: list[tuple[int, int]] = []
    open_backend(planted_drafter([{}] * 4)).score(
        ScoreInput(filler(300, seed=81), scorer="mid_layer"),
        stop=threading.Event(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("scorer", ["specprefill", "mid_layer", "lexical", "ends", "random"])
def test_a_stop_set_beforehand_ends_the_pass_at_once(open_backend: Open, scorer: str) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        open_backend(planted_drafter([{}])).score(
            ScoreInput(filler(300, seed=82), scorer=scorer),
            stop=stop,
            progress=lambda done, total: None,
        )


def test_a_stop_between_layers_ends_the_pass_before_the_next_one(open_backend: Open) -> None:
    stop, seen = threading.Event(), []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            stop.set()

    backend = open_backend(planted_drafter([{}] * 5))
    with pytest.raises(Cancelled):
        backend.score(ScoreInput(filler(300, seed=83)), stop=stop, progress=progress)
    assert seen == [0, 1, 2]
    # The backend serves the next request.
    assert score(backend, filler(300, seed=83)).layers_run == 5


def test_an_id_outside_the_vocabulary_is_refused(open_backend: Open) -> None:
    backend = open_backend(planted_drafter([{}]))
    for wrong in (-1, 512):
        ids = filler(100, seed=84)
        ids[50] = wrong
        with pytest.raises(InvalidRequest, match=rf"\[0, 512\), got {wrong}"):
            score(backend, ids)


def test_scores_that_are_not_finite_are_a_fault_and_not_a_selection(open_backend: Open) -> None:
    weights = planted_drafter([{}])
    weights.embedding[120] = np.nan
    ids = filler(300, seed=85)
    ids[10] = 120
    with pytest.raises(EngineFault):
        score(open_backend(weights), ids)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 31, 32, 33])
def test_prompts_shorter_than_a_chunk_or_the_queries_are_scored(
    open_backend: Open, num_tokens: int
) -> None:
    result = score(open_backend(planted_drafter([{}] * 2)), filler(num_tokens, seed=86))
    assert result.scores.shape == (-(-num_tokens // 32),)
    assert result.num_queries == min(8, num_tokens)
    assert result.layers_run == 2
