"""Positions: contiguous ones for every model, gaps where the rope allows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from skim.errors import EngineFault
from target_svc.messages import Int32s, Submit
from tests.fixtures.contexts import greedy, last_row, open_context
from tests.fixtures.engine import collect, random_ids, running_engine, tiny_config, tiny_model

PROMPT = random_ids(300)


def kept() -> tuple[Int32s, Int32s]:
    """Ids and positions of a prompt whose middle and end were dropped."""
    positions = np.r_[0:20, 100:140, 270:290].astype(np.int32)
    return PROMPT[positions], positions


def sharp(arch: str) -> Path:
    """A model whose attention depends on distances: positions matter for its choice."""
    return tiny_model(arch, qk_gain=4.0, logit_scale=4.0)


def test_gapless_logits_are_bit_equal_under_both_names_of_the_model() -> None:
    rows = []
    for arch in ("qwen3", "qwen3vl"):
        with open_context(sharp(arch)) as context:
            rows.append(last_row(context, PROMPT, np.arange(300, dtype=np.int32)))
    assert np.array_equal(rows[0], rows[1])


async def test_original_positions_start_the_answer_at_the_original_length() -> None:
    ids, positions = kept()
    with open_context(sharp("qwen3vl")) as context:
        expected = greedy(context, ids, positions, first=300, count=12)
        assert context.last_position(0) == 310  # the last token was chosen, not decoded
    with open_context(sharp("qwen3vl")) as context:
        elsewhere = greedy(context, ids, np.arange(80, dtype=np.int32), first=80, count=12)
    async with running_engine(tiny_config(sharp("qwen3vl"), n_batch=512)) as engine:
        submit = Submit(
            "a", ids, 12, positions=positions, next_position=300, speculate=False, ignore_eos=True
        )
        answer = await collect(await engine.submit(submit))
    assert answer.ids == expected != elsewhere


async def test_original_positions_survive_chunks_that_end_inside_a_gap() -> None:
    ids, positions = kept()
    answers = []
    for n_batch in (20, 512):
        async with running_engine(tiny_config(sharp("qwen3vl"), n_batch=n_batch)) as engine:
            submit = Submit("a", ids, 10, positions=positions, next_position=300, ignore_eos=True)
            answers.append((await collect(await engine.submit(submit))).ids)
    assert answers[0] == answers[1]


async def test_drafting_over_gaps_does_not_change_the_answer() -> None:
    ids, positions = kept()
    async with running_engine(tiny_config(sharp("qwen3vl"))) as engine:
        answers = []
        for speculate in (False, True):
            submit = Submit(
                f"{speculate}",
                ids,
                200,
                positions=positions,
                original_ids=PROMPT,
                next_position=300,
                speculate=speculate,
                ignore_eos=True,
            )
            answers.append(await collect(await engine.submit(submit)))
    assert answers[1].done is not None and answers[1].done.accepted_tokens > 0
    assert answers[0].ids == answers[1].ids


async def test_contiguous_positions_may_start_anywhere() -> None:
    async with running_engine() as engine:
        submit = Submit("a", PROMPT[:50], 5, positions=np.arange(200, 250, dtype=np.int32))
        assert len((await collect(await engine.submit(submit))).ids) == 5


@pytest.mark.parametrize(
    ("tokens", "positions", "slot", "outputs"),
    [
        (513, 513, 0, 1),
        (0, 0, 0, 0),
        (4, 3, 0, 1),
        (4, 4, 1, 1),
        (4, 4, -1, 1),
        (16, 16, 0, 9),
    ],
    ids=["batch", "empty", "lengths", "slot", "negative slot", "rows"],
)
def test_batch_that_would_abort_the_process_is_refused(
    tokens: int, positions: int, slot: int, outputs: int
) -> None:
    with open_context(tiny_model()) as context:
        flags = np.zeros(tokens, np.bool_)
        flags[:outputs] = True
        with pytest.raises(EngineFault):
            context.decode(
                np.ones(tokens, np.int32), np.arange(positions, dtype=np.int32), slot, flags
            )
        assert np.isfinite(last_row(context, PROMPT, np.arange(300, dtype=np.int32))).all()


def test_token_outside_the_vocabulary_is_refused_before_the_decode() -> None:
    with open_context(tiny_model()) as context, pytest.raises(EngineFault, match="token id"):
        last_row(context, np.array([1, 645], np.int32), np.arange(2, dtype=np.int32))
