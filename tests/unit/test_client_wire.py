"""A client's values as messages, and messages as values."""

from __future__ import annotations

import hashlib
import math

import pytest

from skim.client_types import (
    Admitted,
    Finish,
    Gathered,
    Message,
    Options,
    Plan,
    Progress,
    Text,
)
from skim.client_wire import PART_BYTES, Question, Reader, compose
from skim.errors import EngineFault, InvalidRequest, SpansNotCanonical
from skim.spans import Span
from skim.v1 import common_pb2 as pb
from skim.v1 import gateway_pb2
from skim.v1.gateway_pb2 import GenerateResponse


def test_a_raw_prompt_is_config_parts_and_end_with_digest() -> None:
    prompt = "süß" * 100_000
    config, *parts, end = Question(prompt, None, {}).requests()
    assert not config.config.messages
    sizes = [len(part.prompt.data) for part in parts]
    assert sizes[:-1] == [PART_BYTES] * (len(parts) - 1)
    assert b"".join(part.prompt.data for part in parts) == prompt.encode()
    assert [part.prompt.offset for part in parts] == [i * PART_BYTES for i in range(len(parts))]
    assert not any(part.prompt.HasField("message") for part in parts)
    assert end.end.total_bytes == len(prompt.encode())
    assert end.end.sha256 == hashlib.sha256(prompt.encode()).digest()


def test_chat_states_sizes_and_names_each_parts_message() -> None:
    question = Question(None, [Message("system", "ü"), ("user", ""), ("user", "ab")], {})
    config, *parts, end = question.requests()
    sizes = [(message.role, message.size_bytes) for message in config.config.messages]
    assert sizes == [
        (gateway_pb2.ROLE_SYSTEM, 2),
        (gateway_pb2.ROLE_USER, 0),
        (gateway_pb2.ROLE_USER, 2),
    ]
    assert all(message.HasField("size_bytes") for message in config.config.messages)
    assert [(p.prompt.offset, p.prompt.data, p.prompt.message) for p in parts] == [
        (0, "ü".encode(), 0),
        (2, b"ab", 2),
    ]
    assert end.end.total_bytes == 4


def test_every_option_reaches_its_field() -> None:
    options: Options = {
        "request_id": "id",
        "model": "m",
        "drafter": "d",
        "mode": "skim",
        "positions": "original",
        "protected": [(1, 2)],
        "query": (3, 4),
        "protect_tail_tokens": 5,
        "control_ranges": [(6, 7)],
        "want_spans": True,
        "keep_ratio": 0.25,
        "coverage": 0.5,
        "min_keep": 0.125,
        "max_keep": 0.75,
        "head_chunks": 8,
        "tail_chunks": 9,
        "neighbour_chunks": 10,
        "scorer": "lexical",
        "lookahead_tokens": 11,
        "alpha": 0.5,
        "max_density": 0.25,
        "scorer_seed": 12,
        "max_tokens": 13,
        "temperature": 0.5,
        "top_k": 14,
        "top_p": 0.5,
        "min_p": 0.25,
        "seed": 15,
        "stop": ["x", "y"],
        "logprobs": 3,
        "ignore_eos": True,
        "speculation": False,
        "draft_tokens": 4,
        "deadline_s": 1.0,
    }
    assert set(options) == set(Options.__annotations__)
    assert Question("p", None, options).config == gateway_pb2.GenerateConfig(
        request_id="id",
        model="m",
        drafter="d",
        mode=gateway_pb2.PREFILL_MODE_SKIM,
        positions=pb.POSITION_MODE_ORIGINAL,
        protected=[pb.ByteRange(begin=1, end=2)],
        query=pb.ByteRange(begin=3, end=4),
        protect_tail_tokens=5,
        control_ranges=[pb.ByteRange(begin=6, end=7)],
        want_spans=True,
        selection=pb.SelectionConfig(
            keep_ratio=0.25,
            coverage=0.5,
            min_keep=0.125,
            max_keep=0.75,
            head_chunks=8,
            tail_chunks=9,
            neighbour_chunks=10,
        ),
        scoring=pb.ScoringConfig(
            scorer="lexical", lookahead_tokens=11, alpha=0.5, max_density=0.25, seed=12
        ),
        sampling=pb.SamplingConfig(
            max_tokens=13,
            temperature=0.5,
            top_k=14,
            top_p=0.5,
            min_p=0.25,
            seed=15,
            stop=["x", "y"],
            logprobs=3,
            ignore_eos=True,
        ),
        speculation=pb.SpeculationConfig(enabled=False, draft_tokens=4),
    )


def test_an_option_that_is_left_out_or_none_stays_unset() -> None:
    config = Question("p", None, {"keep_ratio": None}).config  # type: ignore[typeddict-item]
    assert not config.selection.HasField("keep_ratio")
    assert not config.sampling.HasField("temperature")


@pytest.mark.parametrize(
    "options",
    [
        {"keepratio": 0.1},
        {"mode": "fast"},
        {"positions": "any"},
        {"seed": -1},
        {"keep_ratio": "much"},
        {"protected": [(1, -2)]},
        {"protected": [1]},
    ],
)
def test_an_option_that_means_nothing_is_refused(options: Options) -> None:
    with pytest.raises(InvalidRequest):
        Question("p", None, options)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"keep_ratio": 0.1, "seed": -1}, "seed"),
        ({"top_k": -1, "stop": ["x"]}, "top_k"),
        ({"scorer": "ends", "temperature": "hot"}, "temperature"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": math.nan}, "deadline_s"),
    ],
)
def test_the_option_at_fault_is_named(options: Options, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as refused:
        Question("p", None, options)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [(None, None), ("p", [("user", "x")]), (None, []), (None, [("boss", "x")]), ("\ud800", None)],
)
def test_a_request_without_exactly_one_good_prompt_is_refused(
    prompt: str | None, messages: list[tuple[str, str]] | None
) -> None:
    with pytest.raises(InvalidRequest):
        Question(prompt, messages, {})


def test_a_question_stands_below_its_document() -> None:
    assert compose("Why?", "Doc.", None, chat=True) == (None, [Message("user", "Doc.\n\nWhy?")])
    assert compose("Why?", "Doc.", "Be brief.", chat=True) == (
        None,
        [Message("system", "Be brief."), Message("user", "Doc.\n\nWhy?")],
    )
    assert compose("Why?", "Doc.", None, chat=False) == ("Doc.\n\nWhy?\n", None)
    assert compose("Why?", "Doc.", "Sys.", chat=False) == ("Sys.\n\nDoc.\n\nWhy?\n", None)


def test_progress_and_admission_are_read() -> None:
    reader = Reader(b"", 0.0)
    admitted = gateway_pb2.Admitted(request_id="id", model="m", drafter="d")
    assert reader.event(GenerateResponse(admitted=admitted), 1.0) == Admitted("id", "m", "d")
    progress = pb.Progress(stage=pb.STAGE_SCORE, done=1, total=4)
    assert reader.event(GenerateResponse(progress=progress), 1.0) == Progress("score", 1, 4)


def test_a_plan_is_read_with_its_spans() -> None:
    summary = gateway_pb2.PlanSummary(
        skimmed=True, coverage=0.5, spans=pb.SpanSet(prompt_bytes=9, gaps=[1, 2], lengths=[2, 3])
    )
    plan = Reader(b"x" * 9, 0.0).event(GenerateResponse(plan=summary), 1.0)
    assert isinstance(plan, Plan)
    assert (plan.spans, plan.coverage, plan.full_reason) == ((Span(1, 3), Span(5, 8)), 0.5, "")


def test_a_plan_without_spans_or_coverage_says_none() -> None:
    summary = gateway_pb2.PlanSummary(full_reason=pb.FULL_REASON_DRAFTER_LATE)
    plan = Reader(b"", 0.0).event(GenerateResponse(plan=summary), 1.0)
    assert isinstance(plan, Plan)
    assert (plan.spans, plan.coverage, plan.full_reason) == (None, None, "drafter_late")


def test_spans_of_another_prompt_are_refused() -> None:
    summary = gateway_pb2.PlanSummary(spans=pb.SpanSet(prompt_bytes=9, gaps=[8], lengths=[2]))
    with pytest.raises(SpansNotCanonical):
        Reader(b"x" * 9, 0.0).event(GenerateResponse(plan=summary), 1.0)


def test_time_to_the_first_token_counts_from_the_first_byte_sent() -> None:
    reader = Reader(b"", began_s=10.0)
    reader.event(GenerateResponse(plan=gateway_pb2.PlanSummary()), 11.0)
    reader.event(GenerateResponse(tokens=pb.TokenChunk(token_ids=[1])), 12.5)
    reader.event(GenerateResponse(tokens=pb.TokenChunk(text="x", token_ids=[2])), 13.0)
    finish = reader.event(GenerateResponse(finish=gateway_pb2.Finish()), 14.0)
    assert isinstance(finish, Finish)
    assert (finish.ttft_s, finish.total_s) == (2.5, 4.0)


def test_an_answer_without_a_token_has_no_time_to_it() -> None:
    finish = Reader(b"", 10.0).event(GenerateResponse(finish=gateway_pb2.Finish()), 14.0)
    assert isinstance(finish, Finish)
    assert finish.ttft_s == 0.0


def test_logprobs_are_read() -> None:
    chunk = pb.TokenChunk(
        text="a",
        token_ids=[5],
        logprobs=[
            pb.TokenLogprob(
                chosen=pb.TokenAlternative(token_id=5, token=b"a", logprob=-0.5),
                top=[pb.TokenAlternative(token_id=6, token=b"\xff", logprob=-1.5)],
            )
        ],
    )
    text = Reader(b"", 0.0).event(GenerateResponse(tokens=chunk), 1.0)
    assert isinstance(text, Text)
    (logprob,) = text.logprobs
    assert (logprob.token_id, logprob.token, logprob.logprob) == (5, b"a", -0.5)
    assert (logprob.top[0].token_id, logprob.top[0].token) == (6, b"\xff")


def test_an_enum_of_a_later_version_is_unknown_not_a_crash() -> None:
    summary = gateway_pb2.PlanSummary(full_reason=99)  # type: ignore[arg-type]
    plan = Reader(b"", 0.0).event(GenerateResponse(plan=summary), 1.0)
    assert isinstance(plan, Plan)
    assert plan.full_reason == "unknown"


def test_an_event_of_a_later_version_is_passed_over() -> None:
    assert Reader(b"", 0.0).event(GenerateResponse(), 1.0) is None


def test_an_answer_without_an_end_is_refused() -> None:
    gathered = Gathered()
    gathered.add(Admitted("id", "m", "d"))
    gathered.add(Text("half", (1,)))
    with pytest.raises(EngineFault):
        gathered.answer()
