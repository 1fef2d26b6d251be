"""What a caller may write in a config: every bound, by the name of its field."""

from __future__ import annotations

import math

import pytest

from gateway.edge import ask_from_proto, text_messages
from gateway.plan import Mode
from skim.errors import InvalidRequest, PromptTooLong
from skim.spans import Span
from skim.v1 import common_pb2 as pb
from skim.v1 import gateway_pb2
from skim.v1.gateway_pb2 import GenerateConfig, GenerateTextRequest, Message, TextMessage

NAN = math.nan


def selection(**fields: float) -> GenerateConfig:
    return GenerateConfig(selection=pb.SelectionConfig(**fields))  # type: ignore[arg-type]


def scoring(**fields: object) -> GenerateConfig:
    return GenerateConfig(scoring=pb.ScoringConfig(**fields))  # type: ignore[arg-type]


def sampling(**fields: object) -> GenerateConfig:
    return GenerateConfig(sampling=pb.SamplingConfig(**fields))  # type: ignore[arg-type]


def ranges(count: int) -> list[pb.ByteRange]:
    return [pb.ByteRange(begin=i, end=i + 1) for i in range(count)]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (selection(keep_ratio=0.0), "config.selection.keep_ratio"),
        (selection(keep_ratio=-0.1), "config.selection.keep_ratio"),
        (selection(keep_ratio=1.001), "config.selection.keep_ratio"),
        (selection(keep_ratio=NAN), "config.selection.keep_ratio"),
        (selection(keep_ratio=math.inf), "config.selection.keep_ratio"),
        (selection(coverage=0.0), "config.selection.coverage"),
        (selection(coverage=NAN), "config.selection.coverage"),
        (selection(keep_ratio=0.1, coverage=0.9), "config.selection.coverage"),
        (selection(min_keep=0.0), "config.selection.min_keep"),
        (selection(max_keep=1.1), "config.selection.max_keep"),
        (selection(min_keep=0.5, max_keep=0.4), "config.selection.max_keep"),
        (selection(head_chunks=1_025), "config.selection.head_chunks"),
        (selection(tail_chunks=1_025), "config.selection.tail_chunks"),
        (selection(neighbour_chunks=65), "config.selection.neighbour_chunks"),
        (scoring(scorer="best"), "config.scoring.scorer"),
        (scoring(scorer=""), "config.scoring.scorer"),
        (scoring(lookahead_tokens=33), "config.scoring.lookahead_tokens"),
        (scoring(alpha=-0.1), "config.scoring.alpha"),
        (scoring(alpha=NAN), "config.scoring.alpha"),
        (scoring(max_density=0.0), "config.scoring.max_density"),
        (sampling(max_tokens=0), "config.sampling.max_tokens"),
        (sampling(temperature=-1.0), "config.sampling.temperature"),
        (sampling(temperature=NAN), "config.sampling.temperature"),
        (sampling(temperature=101.0), "config.sampling.temperature"),
        (sampling(top_p=0.0), "config.sampling.top_p"),
        (sampling(top_p=NAN), "config.sampling.top_p"),
        (sampling(min_p=-0.1), "config.sampling.min_p"),
        (sampling(min_p=NAN), "config.sampling.min_p"),
        (sampling(top_k=1 << 31), "config.sampling.top_k"),
        (sampling(logprobs=21), "config.sampling.logprobs"),
        (sampling(stop=["x"] * 17), "config.sampling.stop"),
        (sampling(stop=["x", ""]), "config.sampling.stop[1]"),
        (sampling(stop=["ü" * 129]), "config.sampling.stop[0]"),
        (
            GenerateConfig(speculation=pb.SpeculationConfig(draft_tokens=8)),
            "config.speculation.draft_tokens",
        ),
        (
            GenerateConfig(speculation=pb.SpeculationConfig(draft_tokens=0)),
            "config.speculation.draft_tokens",
        ),
        (GenerateConfig(mode=9), "config.mode"),  # type: ignore[arg-type]
        (GenerateConfig(positions=9), "config.positions"),  # type: ignore[arg-type]
        (GenerateConfig(messages=[Message()]), "config.messages[0].role"),
        (
            GenerateConfig(messages=[Message(role=gateway_pb2.ROLE_USER)] * 1_025),
            "config.messages",
        ),
        (
            GenerateConfig(
                messages=[Message(role=gateway_pb2.ROLE_USER)], control_ranges=ranges(1)
            ),
            "config.control_ranges",
        ),
        (GenerateConfig(protected=[pb.ByteRange(begin=3, end=3)]), "config.protected[0]"),
        (GenerateConfig(protected=ranges(1_025)), "config.protected"),
        (GenerateConfig(query=pb.ByteRange(begin=4, end=3)), "config.query"),
        (GenerateConfig(protect_tail_tokens=65_537), "config.protect_tail_tokens"),
        (
            GenerateConfig(control_ranges=[*ranges(2)[::-1]]),
            "config.control_ranges[1]",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(config: GenerateConfig, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask_from_proto(config)
    assert refused.value.field == field
    assert refused.value.metadata["got"]
    assert refused.value.metadata["allowed"]


@pytest.mark.parametrize(
    "config",
    [
        GenerateConfig(),
        selection(keep_ratio=1.0, head_chunks=0, tail_chunks=1_024, neighbour_chunks=64),
        selection(coverage=1.0, min_keep=0.3, max_keep=0.3),
        selection(coverage=1.0, min_keep=0.5),  # moves the default of max_keep
        scoring(scorer="lexical", lookahead_tokens=32, alpha=0.0, max_density=1.0),
        sampling(temperature=100.0, top_p=1.0, min_p=1.0, logprobs=0, top_k=0, max_tokens=1),
        sampling(stop=["ü" * 128] * 16),
        GenerateConfig(protected=ranges(1_024), protect_tail_tokens=65_536),
    ],
)
def test_the_bounds_themselves_are_allowed(config: GenerateConfig) -> None:
    ask_from_proto(config)


def test_floats_are_shown_as_the_caller_wrote_them() -> None:
    with pytest.raises(InvalidRequest, match=r"got 1\.1$"):
        ask_from_proto(selection(keep_ratio=1.1))


def test_an_empty_config_takes_the_defaults() -> None:
    ask = ask_from_proto(GenerateConfig())
    assert (ask.mode, ask.protect_tail_tokens, ask.query, ask.sizes) == (Mode.AUTO, 256, None, None)


def test_an_explicit_zero_of_protected_tail_tokens_is_kept() -> None:
    assert ask_from_proto(GenerateConfig(protect_tail_tokens=0)).protect_tail_tokens == 0


def test_sizes_count_only_where_all_are_stated() -> None:
    user, sized = gateway_pb2.ROLE_USER, Message(role=gateway_pb2.ROLE_USER, size_bytes=3)
    assert ask_from_proto(GenerateConfig(messages=[sized, sized])).sizes == (3, 3)
    assert ask_from_proto(GenerateConfig(messages=[sized, Message(role=user)])).sizes is None


def test_a_unary_request_becomes_the_stream_that_it_stands_for() -> None:
    request = GenerateTextRequest(
        chat=[
            TextMessage(role=gateway_pb2.ROLE_SYSTEM, content="kürz"),
            TextMessage(role=gateway_pb2.ROLE_USER, content=""),
            TextMessage(role=gateway_pb2.ROLE_USER, content="why?"),
        ],
        config=GenerateConfig(query=pb.ByteRange(begin=5, end=9)),
    )
    config, *parts, end = text_messages(request)
    assert ask_from_proto(config.config).sizes == (5, 0, 4)
    assert ask_from_proto(config.config).query == Span(5, 9)
    assert [(p.prompt.offset, p.prompt.data, p.prompt.message) for p in parts] == [
        (0, "kürz".encode(), 0),
        (5, b"why?", 2),
    ]
    assert end.end.total_bytes == 9


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (GenerateTextRequest(), "prompt"),
        (GenerateTextRequest(prompt="x", chat=[TextMessage(content="y")]), "prompt"),
        (
            GenerateTextRequest(prompt="x", config=GenerateConfig(messages=[Message()])),
            "config.messages",
        ),
    ],
)
def test_a_unary_request_needs_exactly_one_prompt(
    request_: GenerateTextRequest, field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        text_messages(request_)
    assert refused.value.field == field


def test_a_unary_prompt_is_bounded() -> None:
    with pytest.raises(PromptTooLong):
        text_messages(GenerateTextRequest(prompt="x" * ((1 << 20) + 1)))
