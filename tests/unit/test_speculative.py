"""Proposing and verifying drafts: the rules, and that no draft can change an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from target_svc.sampling import Sampler, Sampling
from target_svc.speculative import Drafter, NgramDrafter, NoDrafter, verify


def drafter(*prompt: int, capacity: int = 100) -> NgramDrafter:
    return NgramDrafter(np.array(prompt, np.int32), capacity)


def never(_: int) -> bool:
    return False


def test_continuation_of_a_repeated_pair_is_proposed() -> None:
    assert drafter(7, 8, 1, 2, 3, 9, 7, 8).propose(3).tolist() == [1, 2, 3]


def test_single_token_in_common_is_too_little() -> None:
    assert drafter(8, 1, 2, 3, 7, 8).propose(3).tolist() == []


def test_longer_match_beats_a_later_shorter_one() -> None:
    assert drafter(5, 6, 7, 1, 9, 6, 7, 2, 5, 6, 7).propose(1).tolist() == [1]


def test_latest_of_equal_matches_wins() -> None:
    assert drafter(6, 7, 1, 6, 7, 2, 6, 7).propose(1).tolist() == [2]


def test_match_may_span_prompt_and_answer() -> None:
    found = drafter(4, 5, 6, 1, 2, 9, 4)
    found.extend([5, 6])
    assert found.propose(2).tolist() == [1, 2]


def test_answer_is_matched_too() -> None:
    found = drafter(1)
    found.extend([2, 3, 4, 2, 3])
    assert found.propose(1).tolist() == [4]


def test_loop_is_continued_past_its_end() -> None:
    assert drafter(1, 2, 1, 2).propose(5).tolist() == [1, 2, 1, 2, 1]


def test_match_at_the_very_start_is_found() -> None:
    assert drafter(1, 2, 3, 1, 2).propose(1).tolist() == [3]


def test_text_does_not_wrap_around_its_start() -> None:
    # The first 7 has nothing before it; read backwards past the start, another 7 would be.
    assert drafter(7, 1, 2, 7, 7).propose(1).tolist() == []


@pytest.mark.parametrize("limit", [0, -1])
def test_nothing_is_proposed_without_room(limit: int) -> None:
    assert drafter(1, 2, 1, 2).propose(limit).tolist() == []


@pytest.mark.parametrize("prompt", [(), (1,), (1, 1)])
def test_prompt_too_short_to_repeat_proposes_nothing(prompt: tuple[int, ...]) -> None:
    assert drafter(*prompt).propose(4).tolist() == []


def test_wrong_draft_shortens_the_next_and_right_ones_lengthen_it() -> None:
    loop = drafter(*[1, 2] * 4)
    assert len(loop.propose(8)) == 8
    loop.extend([1, 2, 9])  # two were right
    loop.extend([1, 2] * 4)
    assert len(loop.propose(8)) == 3
    loop.extend([1, 2, 1, 2])
    assert len(loop.propose(8)) == 6


def test_proposal_stays_right_when_the_caller_keeps_it() -> None:
    found = drafter(7, 8, 1, 2, 7, 8)
    proposal = found.propose(2)
    found.extend([3, 3, 3])
    assert proposal.tolist() == [1, 2]


def test_more_tokens_than_the_capacity_are_refused() -> None:
    with pytest.raises(ValueError):
        drafter(1, 2, capacity=2).extend([1, 2, 3])


def test_no_drafter_never_proposes() -> None:
    plain = NoDrafter()
    plain.extend([1, 2, 1, 2])
    assert len(plain.propose(8)) == 0


@pytest.mark.parametrize(
    ("drafts", "rows", "emitted", "accepted"),
    [
        ([], [5], [5], 0),
        ([5, 6], [5, 6, 7], [5, 6, 7], 2),
        ([5, 6], [5, 9, 7], [5, 9], 1),
        ([5, 6], [9, 6, 7], [9], 0),
    ],
)
def test_drafts_are_emitted_until_the_target_disagrees(
    drafts: list[int], rows: list[int], emitted: list[int], accepted: int
) -> None:
    assert verify(drafts, rows.__getitem__, never) == (emitted, accepted, False)


@pytest.mark.parametrize(
    ("rows", "emitted", "accepted"), [([5, 2, 7], [5, 2], 2), ([5, 3, 7], [5, 3], 1)]
)
def test_stop_token_ends_the_walk_drafted_or_not(
    rows: list[int], emitted: list[int], accepted: int
) -> None:
    assert verify([5, 2], rows.__getitem__, {2, 3}.__contains__) == (emitted, accepted, True)


def test_rows_after_a_disagreement_are_not_drawn_from() -> None:
    asked: list[int] = []

    def choose(row: int) -> int:
        asked.append(row)
        return 9

    verify([1, 2, 3], choose, never)
    assert asked == [0]


def run(
    row_after: Callable[[Sequence[int]], np.ndarray],
    drafter: Drafter,
    sampling: Sampling,
    prompt: list[int],
    count: int,
) -> tuple[list[int], int]:
    """Decode with an engine of six lines: the row of a position is a function of its prefix."""
    sampler, tokens, steps = Sampler(sampling), list(prompt), 0
    while len(tokens) < len(prompt) + count:
        drafts = drafter.propose(7).tolist()

        choices = (sampler.choose(row_after(tokens + drafts[:row])) for row in range(8))
        verdict = verify(drafts, lambda _, choices=choices: next(choices), never)
        tokens += verdict.emitted
        drafter.extend(verdict.emitted)
        steps += 1
    return tokens[len(prompt) :][:count], steps


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([Sampling(), Sampling(0.8, seed=3), Sampling(1.5, top_k=3, seed=4)]),
)
def test_answer_is_the_same_with_and_without_drafts(seed: int, sampling: Sampling) -> None:
    # Eight tokens and a row that depends on the last two: repetitions, right and wrong drafts.
    table = np.random.default_rng(seed).normal(0, 2, (8, 8, 8)).astype(np.float32)

    def row_after(tokens: Sequence[int]) -> np.ndarray:
        after: np.ndarray = table[tokens[-2], tokens[-1]]
        return after

    prompt = np.random.default_rng(seed + 1).integers(0, 8, 40).tolist()
    plain, _ = run(row_after, NoDrafter(), sampling, prompt, 60)
    drafted, _ = run(row_after, drafter(*prompt), sampling, prompt, 60)
    assert drafted == plain


def test_drafts_save_steps_on_a_text_that_repeats() -> None:
    def row_after(tokens: Sequence[int]) -> np.ndarray:
        return np.eye(5, dtype=np.float32)[(tokens[-1] + 1) % 5]

    _, steps = run(row_after, drafter(*list(range(5)) * 3), Sampling(), list(range(5)) * 3, 60)
    assert steps <= 60 / 8 + 1
