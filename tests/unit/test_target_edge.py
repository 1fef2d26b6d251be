"""What the target refuses in a config and a plan, and what it makes of good ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from skim.errors import InvalidRequest, NotFound, SkimError, SpansNotCanonical
from skim.v1 import common_pb2 as pb
from skim.v1 import target_pb2
from skim.wire import spans_to_proto
from target_svc.config import TargetSettings
from target_svc.edge import ask_from_proto, event_to_proto, plan_from_proto
from target_svc.request import AnswerToken, Ask, Ended, Piece, Plan, TokenScore
from target_svc.sampling import Sampling

SETTINGS = TargetSettings(model=Path("/models/tiny.gguf"), gen_max=64)


def ask(**fields: Any) -> Ask:
    config = target_pb2.TargetGenerateConfig(**fields)
    return ask_from_proto(config, SETTINGS, deadline_s=None)


def sampling(**fields: Any) -> Ask:
    return ask(sampling=pb.SamplingConfig(**fields))


def test_an_empty_config_means_greedy_with_speculation_and_positions_by_the_rope() -> None:
    found = ask()
    assert found.max_tokens == 64 and found.sampling.greedy and found.speculate
    assert found.positions == "auto" and found.stops == () and not found.ignore_eos
    assert found.request_id


def test_set_fields_arrive() -> None:
    found = ask(
        request_id="r-1",
        model="tiny",
        sampling=pb.SamplingConfig(
            max_tokens=9,
            temperature=0.5,
            top_k=3,
            top_p=0.25,
            min_p=0.125,
            seed=0,
            logprobs=2,
            stop=["é"],
            ignore_eos=True,
        ),
        speculation=pb.SpeculationConfig(enabled=False, draft_tokens=2),
        positions=pb.POSITION_MODE_COMPACTED,
        control_ranges=[pb.ByteRange(begin=0, end=4), pb.ByteRange(begin=4, end=5)],
    )
    assert found.sampling == Sampling(0.5, 3, 0.25, 0.125, 0, 2)
    assert (found.request_id, found.max_tokens, found.stops) == ("r-1", 9, ("é",))
    assert (found.ignore_eos, found.speculate, found.draft_tokens) == (True, False, 2)
    assert found.positions == "compacted"
    assert [tuple(span) for span in found.control_ranges] == [(0, 4), (4, 5)]


def test_an_unset_seed_is_drawn_afresh() -> None:
    assert sampling().sampling.seed != sampling().sampling.seed


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 100.5}, "temperature"),
        ({"top_k": 1 << 31}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.01}, "min_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["ok", "é" * 129]}, "stop[1]"),
        ({"stop": ["x"] * 17}, "stop"),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_name(
    fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sampling(**fields)
    assert refused.value.field == f"config.sampling.{field}"
    assert {"got", "allowed"} <= set(refused.value.metadata)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"request_id": "r" * 129}, "config.request_id"),
        ({"positions": 7}, "config.positions"),
        ({"speculation": pb.SpeculationConfig(draft_tokens=0)}, "config.speculation.draft_tokens"),
        ({"speculation": pb.SpeculationConfig(draft_tokens=8)}, "config.speculation.draft_tokens"),
        ({"control_ranges": [pb.ByteRange(begin=3, end=3)]}, "config.control_ranges[0]"),
        (
            {"control_ranges": [pb.ByteRange(begin=3, end=6), pb.ByteRange(begin=5, end=7)]},
            "config.control_ranges[1]",
        ),
    ],
)
def test_any_other_value_out_of_range_is_refused_by_name(
    fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask(**fields)
    assert refused.value.field == field


def test_another_model_is_not_found() -> None:
    with pytest.raises(NotFound) as refused:
        ask(model="other")
    assert refused.value.metadata == {"got": "other", "allowed": "tiny"}


PROMPT = "naïve text".encode()


def skim(*pairs: tuple[int, int], prompt_bytes: int = len(PROMPT)) -> target_pb2.Plan:
    spans = spans_to_proto(pairs, prompt_bytes)  # type: ignore[arg-type]
    return target_pb2.Plan(skim=target_pb2.SkimPlan(spans=spans))


def full(**fields: Any) -> target_pb2.Plan:
    return target_pb2.Plan(full=target_pb2.FullPlan(**fields))


def test_good_plans_arrive() -> None:
    assert plan_from_proto(skim((0, 4), (5, 6)), PROMPT) == Plan(((0, 4), (5, 6)))
    assert plan_from_proto(full(), PROMPT) == Plan(None)
    fallback = spans_to_proto([(0, 1)], len(PROMPT))  # type: ignore[list-item]
    assert plan_from_proto(full(fallback=fallback), PROMPT) == Plan(None, ((0, 1),))


@pytest.mark.parametrize(
    ("plan", "field", "kind"),
    [
        (target_pb2.Plan(), "plan.kind", InvalidRequest),
        (skim(), "plan.skim.spans", InvalidRequest),
        (skim((0, 4), prompt_bytes=10), "plan.skim.spans.prompt_bytes", InvalidRequest),
        (skim((0, 3)), "spans[0]", SpansNotCanonical),
        (skim((0, 99)), "spans[0]", SpansNotCanonical),
        (skim((0, 2), (2, 4)), "spans[1]", SpansNotCanonical),
        (
            full(fallback=pb.SpanSet(prompt_bytes=11)),
            "plan.full.fallback",
            InvalidRequest,
        ),
        (
            full(fallback=pb.SpanSet(prompt_bytes=3, gaps=[0], lengths=[1])),
            "plan.full.fallback.prompt_bytes",
            InvalidRequest,
        ),
    ],
)
def test_a_bad_plan_is_refused_by_name(
    plan: target_pb2.Plan, field: str, kind: type[SkimError]
) -> None:
    with pytest.raises(kind) as refused:
        plan_from_proto(plan, PROMPT)
    assert refused.value.field == field


def test_logprobs_carry_the_bytes_of_their_tokens() -> None:
    token = AnswerToken(65, -0.5, (TokenScore(65, -0.5), TokenScore(66, -1.5)))
    chunk = event_to_proto(Piece("A", (token,)), lambda token_id: bytes([token_id])).tokens
    assert chunk.text == "A" and list(chunk.token_ids) == [65]
    assert chunk.logprobs[0].chosen.token == b"A"
    assert [(top.token, top.logprob) for top in chunk.logprobs[0].top] == [
        (b"A", -0.5),
        (b"B", -1.5),
    ]


def test_tokens_without_logprobs_carry_none() -> None:
    chunk = event_to_proto(Piece("A", (AnswerToken(65),)), lambda _: b"").tokens
    assert list(chunk.token_ids) == [65] and not chunk.logprobs


def test_the_end_of_an_answer_carries_its_counts() -> None:
    ended = Ended("eos", 9, 8, 7, 6, 5, 4, 3, 0.5, 0.25, 1 << 63, "ngram")
    finish = event_to_proto(ended, lambda _: b"").finish
    assert finish.reason == pb.FINISH_REASON_EOS and finish.seed == 1 << 63
    usage = finish.usage
    assert (usage.prompt_bytes, usage.prompt_tokens, usage.kept_tokens) == (9, 8, 7)
    assert (usage.completion_tokens, usage.draft_tokens, usage.accepted_tokens) == (6, 5, 4)
    assert (usage.target_steps, finish.prefill_s, finish.decode_s) == (3, 0.5, 0.25)
    assert finish.speculation == "ngram"
