"""Speculation is lossless: rollback, the same batch shapes, other batch shapes, sampling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import pytest

from skim.errors import SkimError
from target_svc.llama.context import Context
from target_svc.llama.lane import Lane
from target_svc.llama.sequence import Sequence
from target_svc.messages import Done, FromEngine, Int32s, Submit, Tokens
from target_svc.sampling import Sampling
from target_svc.speculative import Drafter
from tests.fixtures.contexts import last_row, open_context
from tests.fixtures.engine import Answer, collect, random_ids, running_engine, tiny_model

PROMPT = random_ids(200)
DRAFTS = 7
# Unit-scale logits, f32 weights, f16 K and V: a value that rounds to the other f16 neighbour is off
# by 2^-11, and a mean over 200 of them by less. Measured between 1 row and 8: 3e-5.
SHAPE_NOISE = 5e-4
NEVER_CHOSEN = 643  # a user-defined token that these random models do not rank first


@dataclass
class Script:
    """A drafter that proposes what a function of the number of tokens so far says."""

    propose_at: Callable[[int, int], list[int]]
    count: int = 0
    proposed: list[int] = field(default_factory=list)

    def propose(self, limit: int) -> Int32s:
        draft = self.propose_at(self.count, limit)[:limit]
        self.proposed.append(len(draft))
        return np.array(draft, np.int32)

    def extend(self, tokens: Seq[int]) -> None:
        self.count += len(tokens)


class Outlet:
    """Collects what a lane sends."""

    def __init__(self) -> None:
        self.answers: defaultdict[str, Answer] = defaultdict(Answer)

    def send(self, message: FromEngine) -> None:
        if isinstance(message, Tokens):
            self.answers[message.request_id].ids += message.ids.tolist()
            self.answers[message.request_id].top_logprobs += message.top_logprobs.tolist()
        elif isinstance(message, Done):
            self.answers[message.request_id].done = message

    def fail(self, sequence: Sequence, error: SkimError) -> None:
        raise error

    def ended(self, sequence: Sequence) -> None:
        pass

    def cancelled(self, request_id: str) -> bool:
        return False


def decode(context: Context, drafter: Drafter, count: int, sampling: Sampling) -> Answer:
    """Run one request through a lane with the given drafter."""
    outlet = Outlet()
    lane = Lane(lambda _: context, outlet, DRAFTS, deaf_max_s=0.0)
    submit = Submit("a", PROMPT, count, sampling=sampling, ignore_eos=True)
    sequence = Sequence.of(submit, frozenset(), can_draft=False)
    sequence.drafter = drafter
    lane.waiting.append(sequence)
    while lane.busy:
        lane.step()
    return outlet.answers["a"]


def plain_with_verify_shapes(context: Context, count: int, sampling: Sampling) -> Answer:
    """Plain decoding in batches of the verify shape: every draft is wrong, row 0 alone is used."""
    answer = decode(context, Script(lambda _, limit: [NEVER_CHOSEN] * limit), count, sampling)
    assert answer.done is not None and answer.done.accepted_tokens == 0
    assert answer.done.steps == count - 1
    return answer


def oracle(answer: list[int], wrong_every: int = 0) -> Script:
    """A drafter that knows the answer, and is wrong at every n-th token of it."""
    known = [
        NEVER_CHOSEN if wrong_every and i % wrong_every == 0 else t for i, t in enumerate(answer)
    ]
    return Script(lambda count, limit: known[count : count + limit])


GREEDY = Sampling(top_logprobs=2)
SAMPLED = [
    Sampling(temperature=0.7, seed=1),
    Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.02, seed=2),
]


@pytest.mark.parametrize("wrong_every", [0, 1, 3, 5])
def test_answer_equals_plain_greedy_run_with_the_same_batch_shapes(wrong_every: int) -> None:
    with open_context(tiny_model()) as context:
        plain = plain_with_verify_shapes(context, 80, GREEDY)
        drafted = decode(context, oracle(plain.ids, wrong_every), 80, GREEDY)
    assert drafted.ids == plain.ids
    assert drafted.done is not None
    if wrong_every == 0:  # 8 tokens a step after the first
        assert drafted.done.steps == 10 and drafted.done.accepted_tokens == 69


@pytest.mark.parametrize("sampling", SAMPLED)
def test_sampled_answer_is_the_same_with_right_wrong_and_no_drafts(sampling: Sampling) -> None:
    with open_context(tiny_model(logit_scale=2.0)) as context:
        plain = decode(context, Script(lambda _, limit: []), 60, sampling)
        wrong = plain_with_verify_shapes(context, 60, sampling)
        right = decode(context, oracle(plain.ids, wrong_every=4), 60, sampling)
    assert plain.ids == wrong.ids == right.ids
    assert right.done is not None and right.done.accepted_tokens > 30


def test_answer_equals_plain_greedy_up_to_margins_below_the_shape_noise() -> None:
    with open_context(tiny_model(seed=3)) as context:
        plain = decode(context, Script(lambda _, limit: []), 150, GREEDY)
        drafted = decode(context, oracle(plain.ids, wrong_every=5), 150, GREEDY)
    margins = np.array(plain.top_logprobs[0::2]) - np.array(plain.top_logprobs[1::2])
    close = np.flatnonzero(margins < 4 * SHAPE_NOISE)
    comparable = int(close[0]) if len(close) else 150
    assert comparable >= 20, "this seed's margins are too small to say anything"
    assert drafted.ids[:comparable] == plain.ids[:comparable]
    assert len(close) <= 3


def test_rollback_leaves_no_trace_of_what_was_drafted() -> None:
    token, following = random_ids(1, 8), random_ids(1, 9)
    at = np.arange(200, 208, dtype=np.int32)
    rows = []
    with open_context(tiny_model()) as context:
        last_row(context, PROMPT, np.arange(200, dtype=np.int32))
        for seed in (20, 21):
            drafts = random_ids(DRAFTS, seed)
            context.decode(np.r_[token, drafts], at, 0, np.ones(8, np.bool_))
            context.remove(0, 201)
            assert context.last_position(0) == 200
            rows.append(last_row(context, following, at[1:2]))
            context.remove(0, 200)
    assert np.array_equal(rows[0], rows[1])


def test_cache_after_a_rollback_equals_a_fresh_decode() -> None:
    tokens = random_ids(4, 8)
    with open_context(tiny_model()) as context:
        last_row(context, PROMPT, np.arange(200, dtype=np.int32))
        drafted = np.r_[tokens[:3], random_ids(5, 9)]  # two drafts are right, five are wrong
        context.decode(drafted, np.arange(200, 208, dtype=np.int32), 0, np.ones(8, np.bool_))
        context.remove(0, 203)
        after = last_row(context, tokens[3:], np.array([203], np.int32))
    with open_context(tiny_model()) as context:
        last_row(context, PROMPT, np.arange(200, dtype=np.int32))
        for position in range(200, 204):
            at = np.array([position], np.int32)
            fresh = last_row(context, tokens[position - 200 : position - 199], at)
    assert np.abs(after - fresh).max() <= SHAPE_NOISE


def test_two_sequences_verify_in_one_batch_as_they_do_alone() -> None:
    with open_context(tiny_model(), slots=2) as context:
        alone = plain_with_verify_shapes(context, 30, GREEDY).ids
        outlet = Outlet()
        lane = Lane(lambda _: context, outlet, DRAFTS, deaf_max_s=0.0)
        for name, wrong_every in (("a", 3), ("b", 4)):
            submit = Submit(name, PROMPT, 30, ignore_eos=True)
            sequence = Sequence.of(submit, frozenset(), can_draft=False)
            sequence.drafter = oracle(alone, wrong_every)
            lane.waiting.append(sequence)
        while lane.busy:
            lane.step()
    assert outlet.answers["a"].ids == outlet.answers["b"].ids == alone


async def test_dropped_text_of_the_original_prompt_helps_drafting() -> None:
    async with running_engine() as engine:
        plain = await collect(
            await engine.submit(Submit("plain", PROMPT, 60, speculate=False, ignore_eos=True))
        )
        # What the target does not see, the drafter still knows.
        original = np.r_[PROMPT[:100], np.array(plain.ids, np.int32), PROMPT[100:]]
        submit = Submit("drafted", PROMPT, 60, original_ids=original, ignore_eos=True)
        drafted = await collect(await engine.submit(submit))
    assert drafted.ids == plain.ids
    assert plain.done is not None and plain.done.acceptance_length == 1.0
    assert drafted.done is not None and drafted.done.acceptance_length >= 3.0


async def test_draft_length_of_a_request_bounds_its_batches() -> None:
    async with running_engine() as engine:
        answers = []
        for drafts in (1, 7):
            submit = Submit(f"{drafts}", PROMPT, 100, draft_tokens=drafts, ignore_eos=True)
            answers.append(await collect(await engine.submit(submit)))
    done = answers[0].done
    assert done is not None and 0 < done.draft_tokens <= done.steps
    assert answers[0].ids == answers[1].ids
