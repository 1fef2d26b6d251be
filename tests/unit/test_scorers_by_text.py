"""Scorers that need no model: lexical anchors, and the controls ends and random."""

from __future__ import annotations

import numpy as np
import pytest

from drafter_svc.backend import ScoreInput
from drafter_svc.scorers import TEXT_SCORERS
from tests.fixtures.planted_drafter import filler


def test_lexical_ranks_the_chunk_with_the_questions_rare_token_first() -> None:
    ids = filler(4000, seed=90)
    ids[-20], ids[1234] = 7, 7
    scores = TEXT_SCORERS["lexical"].score(ScoreInput(ids, query_tokens=(3970, 4000)))
    assert int(scores.argmax()) == 1234 // 32


def test_lexical_prefers_a_whole_phrase_to_its_scattered_words() -> None:
    ids = filler(4000, seed=91)
    phrase = [7, 8, 9, 10]
    ids[-10:-6] = phrase
    ids[1000:1004] = phrase
    ids[[2000, 2003, 2006, 2009]] = phrase
    scores = TEXT_SCORERS["lexical"].score(ScoreInput(ids, query_tokens=(3970, 4000)))
    assert int(scores.argmax()) == 1000 // 32
    assert scores[1000 // 32] > 2 * scores[2000 // 32]


def test_lexical_weighs_a_token_by_its_rarity() -> None:
    ids = filler(4000, seed=92)
    ids[-5], ids[-9] = 7, 8
    ids[500] = 7
    ids[1000:3000:50] = 8
    scores = TEXT_SCORERS["lexical"].score(ScoreInput(ids, query_tokens=(3980, 4000)))
    assert int(scores.argmax()) == 500 // 32


def test_lexical_does_not_score_the_question_for_containing_itself() -> None:
    ids = filler(4000, seed=93)
    ids[100:104] = [7, 8, 9, 10]
    scores = TEXT_SCORERS["lexical"].score(ScoreInput(ids, query_tokens=(100, 104)))
    assert not scores.any()


def test_lexical_counts_occurrences_outside_the_question_only() -> None:
    ids = filler(4000, seed=98)
    ids[500], ids[1488] = 7, 8
    ids[-5] = 8
    ids[[-7, -9, -11, -13]] = 7  # said four times, found once: as good an anchor as the other
    scores = TEXT_SCORERS["lexical"].score(ScoreInput(ids, query_tokens=(3980, 4000)))
    assert scores[500 // 32] == pytest.approx(scores[1488 // 32], rel=0.2)


def test_lexical_takes_the_prompts_end_for_the_question_when_none_is_named() -> None:
    ids = filler(4000, seed=94)
    ids[-90], ids[1234] = 7, 7
    scores = TEXT_SCORERS["lexical"].score(ScoreInput(ids))
    assert int(scores.argmax()) == 1234 // 32


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 50])
def test_lexical_takes_prompts_shorter_than_its_runs(num_tokens: int) -> None:
    scores = TEXT_SCORERS["lexical"].score(ScoreInput(filler(num_tokens, seed=95)))
    assert scores.shape == (-(-num_tokens // 32),) and np.isfinite(scores).all()


def test_ends_ranks_chunks_from_both_ends_inward() -> None:
    scores = TEXT_SCORERS["ends"].score(ScoreInput(filler(7 * 32, seed=96)))
    assert np.argsort(-scores).tolist() == [6, 0, 5, 1, 4, 2, 3]
    assert len(set(scores.tolist())) == 7


def test_random_is_a_function_of_the_seed() -> None:
    ids = filler(4000, seed=97)
    draw = TEXT_SCORERS["random"].score
    assert np.array_equal(draw(ScoreInput(ids, seed=1)), draw(ScoreInput(ids, seed=1)))
    assert not np.array_equal(draw(ScoreInput(ids, seed=1)), draw(ScoreInput(ids, seed=2)))
