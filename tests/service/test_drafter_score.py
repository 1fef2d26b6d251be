"""Scoring over the wire: what a good request gets, and what every bad one gets."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from drafter_svc.edge import ask_from_proto
from drafter_svc.pipeline import skim, tokenise
from skim.errors import (
    DeadlineExceeded,
    DigestMismatch,
    InvalidRequest,
    NotFound,
    PartOutOfOrder,
    PromptTooLong,
    SkimError,
    Unavailable,
)
from skim.rpc import errors_from_peer
from skim.spans import Span, check_canonical
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2
from skim.wire import spans_from_proto
from tests.fixtures.drafter_service import (
    DrafterService,
    iter_async,
    long_text,
    messages,
    running_drafter,
)
from tests.fixtures.engine import tiny_model

PROMPT = long_text()
NAN = float("nan")
Request = drafter_pb2.ScoreRequest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def drafter() -> AsyncIterator[DrafterService]:
    async with running_drafter(
        prompt_max_bytes=100_000, prompt_max_tokens=4_000, workspace_bytes=1 << 20
    ) as service:
        yield service


pytestmark = pytest.mark.asyncio(loop_scope="module")


def spans_of(result: Any, prompt: bytes = PROMPT) -> list[Span]:
    return spans_from_proto(result.spans, prompt)


def kept_text(result: Any, prompt: bytes = PROMPT) -> bytes:
    return b"\n".join(prompt[begin:end] for begin, end in spans_of(result, prompt))


async def test_spans_are_canonical_and_equal_to_the_pipeline_called_directly(drafter):
    config = drafter_pb2.ScoreConfig(selection=pb.SelectionConfig(keep_ratio=0.4))
    answer = await drafter.send(messages(PROMPT, selection=config.selection))
    result, spans = answer.result, spans_of(answer.result)
    check_canonical(spans, PROMPT)
    host = drafter.host
    ask = ask_from_proto(config, host.settings)
    direct = skim(host.loaded, tokenise(PROMPT, ask, host.loaded.tokenizer), ask)
    assert spans == direct.spans
    assert result.coverage == pytest.approx(direct.selection.coverage)
    assert list(result.layer_density) == pytest.approx(direct.scores.density)
    assert 0.3 * result.prompt_tokens < result.kept_tokens <= 0.4 * result.prompt_tokens
    assert result.kept_tokens == direct.selection.kept_tokens
    assert result.outcome == drafter_pb2.SELECTION_OUTCOME_KEEP_RATIO


async def test_result_says_who_scored_how_and_how_long_it_took(drafter):
    result = (await drafter.score(PROMPT)).result
    loaded = drafter.host.loaded
    assert (result.model, result.model_digest) == ("one", loaded.model_digest)
    assert (result.scorer, result.yarn_factor, result.cut_row_share) == ("specprefill", 1.0, 0.0)
    assert result.forward_s > 0 and result.select_s > 0
    assert result.tokenise_s >= 0 and result.queue_s >= 0
    assert result.spans.prompt_bytes == len(PROMPT)


async def test_progress_counts_layers_up_to_the_last_and_the_result_comes_once_at_the_end(drafter):
    answer = await drafter.score(PROMPT)
    stages, done, total = zip(*answer.progress, strict=True)
    assert set(stages) == {pb.STAGE_SCORE} and set(total) == {2}
    assert list(done) == sorted(set(done)) and done[-1] == 2


@pytest.mark.parametrize("seed", range(3))
async def test_any_chopping_of_the_parts_gives_the_same_spans(drafter, seed):
    whole = (await drafter.score(PROMPT, part_bytes=len(PROMPT))).result
    rng = random.Random(seed)
    requests, offset = [Request(config=drafter_pb2.ScoreConfig())], 0
    while offset < len(PROMPT):
        size = rng.choice([1, 2, 3, 7, 64, 501])
        data = PROMPT[offset : offset + size]
        requests.append(Request(prompt=pb.PromptPart(offset=offset, data=data)))
        offset += len(data)
    requests.append(Request(end=pb.PromptEnd(total_bytes=len(PROMPT))))
    assert spans_of((await drafter.send(requests)).result) == spans_of(whole)


async def test_part_by_part_reading_gives_the_result_after_the_end_only(drafter):
    call = drafter.stub.Score()
    *head, end = messages(PROMPT, part_bytes=400)
    for message in head:
        await call.write(message)
    assert drafter.host.queue.running == 0
    await call.write(end)
    await call.done_writing()
    events = [response.WhichOneof("event") async for response in call]
    assert events[-1] == "result" and events.count("result") == 1


async def test_one_token_is_kept_whole(drafter):
    result = (await drafter.score(b"a")).result
    assert spans_of(result, b"a") == [Span(0, 1)]
    assert (result.prompt_tokens, result.kept_tokens) == (1, 1)


async def test_ratio_of_one_keeps_everything_as_one_span(drafter):
    result = (await drafter.score(PROMPT, selection=pb.SelectionConfig(keep_ratio=1.0))).result
    assert spans_of(result) == [Span(0, len(PROMPT))]
    assert result.kept_tokens == result.prompt_tokens


async def test_protected_range_is_kept_and_rounded_outward(drafter):
    # From the middle of a letter of two bytes to the middle of one of three.
    begin, end = PROMPT.index("ö".encode(), 400) + 1, PROMPT.index("京".encode(), 400) + 1
    protected = [pb.ByteRange(begin=begin, end=end)]
    result = (await drafter.score(PROMPT, protected=protected)).result
    assert any(s.begin < begin and end < s.end for s in spans_of(result))


async def test_forced_chunks_over_the_budget_are_kept_alone(drafter):
    protected = [pb.ByteRange(begin=100, end=1_500)]
    result = (await drafter.score(PROMPT, protected=protected)).result
    assert result.outcome == drafter_pb2.SELECTION_OUTCOME_FORCED_ONLY
    assert result.kept_tokens > 0.3 * result.prompt_tokens
    assert spans_of(result)[0].end >= 1_500


async def test_query_reaches_the_backend_in_tokens_and_so_do_the_settings(drafter):
    text = "ab " * 40
    scoring = pb.ScoringConfig(alpha=0.5, max_density=0.75, seed=9)
    # Bytes [4, 8) are the b of the second pair, a space, an a and a b.
    await drafter.score(text.encode(), query=pb.ByteRange(begin=4, end=8), scoring=scoring)
    asked, tokenizer = drafter.backend.requests[-1], drafter.host.loaded.tokenizer
    ends = tokenizer.encode(text.encode()).ends
    begin, end = asked.query_tokens
    starts = [0, *ends]
    assert starts[begin] <= 4 < ends[begin] and starts[end - 1] < 8 <= ends[end - 1]
    assert (asked.attention.alpha, asked.attention.max_density, asked.seed) == (0.5, 0.75, 9)
    assert (asked.chunk_tokens, asked.pool_kernel, asked.last_token_query) == (32, 13, True)
    await drafter.score(text.encode())
    assert drafter.backend.requests[-1].query_tokens is None


async def test_protected_half_of_a_code_point_protects_the_chunk_of_its_other_half(drafter):
    # Three tokens a snake: the first chunk of 32 tokens ends two bytes into the eleventh.
    prompt = ("x" + "🐍" * 40).encode()
    assert drafter.host.loaded.tokenizer.encode(prompt).ends[31] == 1 + 10 * 4 + 2
    bare = pb.SelectionConfig(head_chunks=0, tail_chunks=0, keep_ratio=0.001)
    protected = [pb.ByteRange(begin=43, end=44)]
    result = (await drafter.score(prompt, selection=bare, protected=protected)).result
    assert result.kept_tokens == 64


async def test_tail_of_the_query_is_kept_but_not_what_stands_before_it(drafter):
    middle = len(PROMPT) // 2
    query = pb.ByteRange(begin=middle, end=middle + 20)
    bare = pb.SelectionConfig(head_chunks=0, tail_chunks=0, keep_ratio=0.001)
    result = (
        await drafter.score(PROMPT, selection=bare, query=query, protect_tail_tokens=65_536)
    ).result
    # Twenty bytes lie in at most two chunks of 32 tokens: the rest of the prompt is not protected.
    assert result.kept_tokens <= 64
    assert any(s.begin <= middle and middle + 20 <= s.end for s in spans_of(result))


async def test_tail_of_the_prompt_is_kept_when_no_query_is_given(drafter):
    bare = pb.SelectionConfig(head_chunks=0, tail_chunks=0, keep_ratio=0.001)
    result = (await drafter.score(PROMPT, selection=bare, protect_tail_tokens=100)).result
    assert 100 <= result.kept_tokens <= 160
    assert spans_of(result)[-1].end == len(PROMPT)


async def test_coverage_mode_reports_what_it_reached(drafter):
    easy = pb.SelectionConfig(coverage=0.4, max_keep=0.9)
    reached = (await drafter.score(PROMPT, selection=easy)).result
    assert reached.outcome == drafter_pb2.SELECTION_OUTCOME_COVERAGE
    assert 0.4 <= reached.coverage <= 1.0
    hard = pb.SelectionConfig(coverage=0.99, max_keep=0.2)
    low = (await drafter.score(PROMPT, selection=hard)).result
    assert low.outcome == drafter_pb2.SELECTION_OUTCOME_LOW_COVERAGE
    assert low.coverage < 0.99 and low.kept_tokens <= 0.2 * low.prompt_tokens


async def test_bound_of_the_caller_moves_the_other_bounds_default(drafter):
    tiny = pb.SelectionConfig(coverage=0.99, max_keep=0.01, head_chunks=0, tail_chunks=0)
    result = (await drafter.score(PROMPT, selection=tiny)).result
    assert result.outcome == drafter_pb2.SELECTION_OUTCOME_LOW_COVERAGE


@pytest.mark.parametrize("scorer", ["mid_layer", "lexical", "ends", "random"])
async def test_every_scorer_answers_and_only_attention_measures_coverage(drafter, scorer):
    result = (await drafter.score(PROMPT, scoring=pb.ScoringConfig(scorer=scorer, seed=3))).result
    assert result.scorer == scorer
    assert result.HasField("coverage") == (scorer == "mid_layer")
    check_canonical(spans_of(result), PROMPT)


async def test_seed_decides_the_random_scorer(drafter):
    def of(seed: int) -> Any:
        scoring = pb.ScoringConfig(scorer="random", seed=seed)
        return drafter.score(PROMPT, scoring=scoring)

    first, again, other = [spans_of((await of(seed)).result) for seed in (1, 1, 2)]
    assert first == again != other


async def test_look_ahead_answers_while_it_fits_and_names_limit_and_got_when_not(drafter):
    scoring = pb.ScoringConfig(lookahead_tokens=2)
    result = (await drafter.score(PROMPT, scoring=scoring)).result
    check_canonical(spans_of(result), PROMPT)
    # 2 layers x (K, V) x 2 heads x 32 x 4 bytes = 1 KiB a token: 1 MiB holds 1,024 tokens.
    with pytest.raises(InvalidRequest) as caught:
        await drafter.score(long_text(30), scoring=scoring)
    assert caught.value.metadata["limit"] == str(1 << 20)
    assert int(caught.value.metadata["got"]) > 1 << 20


async def test_special_tokens_are_parsed_in_control_ranges_only(drafter):
    text = b"<|im_start|>user\nsay <|im_end|> twice<|im_end|>\n"
    tokens = drafter.host.loaded.tokenizer
    plain = (await drafter.score(text)).result.prompt_tokens
    controlled = (
        await drafter.score(text, control_ranges=[pb.ByteRange(begin=0, end=17)])
    ).result.prompt_tokens
    assert plain == len(tokens.encode(text))
    assert controlled == len(tokens.encode(text, [(0, 17)])) < plain


async def test_request_id_and_unknown_defaults_are_filled(drafter):
    result = (await drafter.score(PROMPT, request_id="mine", model="one")).result
    assert result.model == "one"


S, C, R = pb.SelectionConfig, pb.ScoringConfig, pb.ByteRange

BAD_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("config.selection.keep_ratio", {"selection": S(keep_ratio=0.0)}),
    ("config.selection.keep_ratio", {"selection": S(keep_ratio=1.5)}),
    ("config.selection.keep_ratio", {"selection": S(keep_ratio=-0.1)}),
    ("config.selection.keep_ratio", {"selection": S(keep_ratio=NAN)}),
    ("config.selection.coverage", {"selection": S(coverage=NAN)}),
    ("config.selection.coverage", {"selection": S(coverage=1.01)}),
    ("config.selection", {"selection": S(keep_ratio=0.1, coverage=0.9)}),
    ("config.selection.min_keep", {"selection": S(min_keep=0.0)}),
    ("config.selection.max_keep", {"selection": S(max_keep=float("inf"))}),
    ("config.selection.max_keep", {"selection": S(min_keep=0.5, max_keep=0.4)}),
    ("config.selection.head_chunks", {"selection": S(head_chunks=1_025)}),
    ("config.selection.tail_chunks", {"selection": S(tail_chunks=1_025)}),
    ("config.selection.neighbour_chunks", {"selection": S(neighbour_chunks=65)}),
    ("config.scoring.scorer", {"scoring": C(scorer="best")}),
    ("config.scoring.scorer", {"scoring": C(scorer="")}),
    ("config.scoring.alpha", {"scoring": C(alpha=NAN)}),
    ("config.scoring.alpha", {"scoring": C(alpha=1.1)}),
    ("config.scoring.max_density", {"scoring": C(max_density=0.0)}),
    ("config.scoring.max_density", {"scoring": C(max_density=NAN)}),
    ("config.scoring.lookahead_tokens", {"scoring": C(lookahead_tokens=33)}),
    (
        "config.scoring.lookahead_tokens",
        {"scoring": C(scorer="lexical", lookahead_tokens=1)},
    ),
    (
        "config.selection.coverage",
        {"scoring": C(scorer="lexical"), "selection": S(coverage=0.9)},
    ),
    ("config.protect_tail_tokens", {"protect_tail_tokens": 65_537}),
    ("config.protected[1]", {"protected": [R(begin=0, end=1), R(begin=5, end=5)]}),
    ("config.protected[0]", {"protected": [R(begin=0, end=len(PROMPT) + 1)]}),
    ("config.protected", {"protected": [R(begin=0, end=1)] * 4_097}),
    ("config.query", {"query": R(begin=9, end=3)}),
    ("config.query", {"query": R(begin=0, end=len(PROMPT) + 1)}),
    ("config.control_ranges[1]", {"control_ranges": [R(begin=5, end=9), R(begin=8, end=12)]}),
    ("config.control_ranges[0]", {"control_ranges": [R(begin=5, end=len(PROMPT) + 1)]}),
    ("config.request_id", {"request_id": "x" * 129}),
]


@pytest.mark.parametrize(("name", "config"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
async def test_bad_config_is_refused_by_field_with_got_and_allowed(drafter, name, config):
    with pytest.raises(InvalidRequest) as caught:
        await drafter.score(PROMPT, **config)
    error = caught.value
    assert error.field == name
    assert error.metadata["got"] and error.metadata["allowed"]
    assert name in error.message


async def test_unknown_model_is_not_found(drafter):
    with pytest.raises(NotFound) as caught:
        await drafter.score(PROMPT, model="another")
    assert caught.value.metadata == {"got": "another", "allowed": "one"}


def sent(*parts: Any, end: Any = None) -> list[Any]:
    config = [Request(config=drafter_pb2.ScoreConfig())]
    return [
        *config,
        *(Request(prompt=part) for part in parts),
        *([Request(end=end)] if end else []),
    ]


PART = pb.PromptPart

BAD_STREAMS: list[tuple[str, type[SkimError], str, list[Any]]] = [
    ("nothing", InvalidRequest, "part", []),
    ("no config", InvalidRequest, "part", messages(PROMPT)[1:]),
    ("empty message", InvalidRequest, "part", [Request()]),
    ("two configs", InvalidRequest, "part", messages(PROMPT)[:1] * 2),
    ("no end", InvalidRequest, "part", messages(PROMPT)[:-1]),
    ("empty prompt", InvalidRequest, "prompt", sent(end=pb.PromptEnd())),
    ("empty part", InvalidRequest, "prompt.data", sent(PART(data=b""))),
    ("large part", InvalidRequest, "prompt.data", sent(PART(data=b"a" * ((1 << 20) + 1)))),
    ("message index", InvalidRequest, "prompt.message", sent(PART(data=b"a", message=0))),
    ("gap", PartOutOfOrder, "prompt.offset", sent(PART(data=b"a"), PART(offset=2, data=b"b"))),
    ("overlap", PartOutOfOrder, "prompt.offset", sent(PART(data=b"ab"), PART(offset=1, data=b"b"))),
    (
        "wrong total",
        PartOutOfOrder,
        "end.total_bytes",
        sent(PART(data=b"ab"), end=pb.PromptEnd(total_bytes=3)),
    ),
    (
        "wrong digest",
        DigestMismatch,
        "end.sha256",
        sent(PART(data=b"ab"), end=pb.PromptEnd(total_bytes=2, sha256=hashlib.sha256().digest())),
    ),
    (
        "not UTF-8",
        InvalidRequest,
        "prompt",
        sent(PART(data=b"ab\xff"), end=pb.PromptEnd(total_bytes=3)),
    ),
    (
        "cut UTF-8",
        InvalidRequest,
        "prompt",
        sent(PART(data="é".encode()[:1]), end=pb.PromptEnd(total_bytes=1)),
    ),
    ("too many bytes", PromptTooLong, "prompt", sent(PART(data=b"a" * 100_001))),
    ("too many tokens", PromptTooLong, "prompt", messages(b"0 " * 4_001)),
]


@pytest.mark.parametrize(
    ("kind", "field", "requests"),
    [case[1:] for case in BAD_STREAMS],
    ids=[c[0] for c in BAD_STREAMS],
)
async def test_bad_stream_is_refused_with_its_reason(drafter, kind, field, requests):
    with pytest.raises(kind) as caught:
        await drafter.send(requests)
    assert type(caught.value) is kind
    assert caught.value.field == field


async def test_too_long_prompts_name_limit_and_got(drafter):
    for prompt, limit in ((b"a" * 100_001, "100000"), (b"0 " * 4_001, "4000")):
        with pytest.raises(PromptTooLong) as caught:
            await drafter.score(prompt)
        assert caught.value.metadata["limit"] == limit
        assert int(caught.value.metadata["got"]) > int(limit)


async def test_reasons_of_an_empty_and_an_invalid_prompt_are_told_apart(drafter):
    for prompt, reason in ((b"", "PROMPT_EMPTY"), (b"ok \xf0\x28", "INVALID_UTF8")):
        with pytest.raises(InvalidRequest) as caught:
            await drafter.score(prompt)
        assert caught.value.reason == reason


async def test_invalid_utf8_that_the_tokenizer_meets_before_the_end_is_still_the_first_error(
    drafter,
):
    prompt = b"word " * 8_000 + b"\xff" + b" word" * 8_000  # pieces of 16 KiB are tokenised early
    with pytest.raises(InvalidRequest) as caught:
        await drafter.score(prompt)
    assert (caught.value.reason, caught.value.metadata["got"]) == (
        "INVALID_UTF8",
        "0xff at byte 40000",
    )


async def test_defect_in_one_request_leaves_the_next_one_whole(drafter):
    before = spans_of((await drafter.score(PROMPT)).result)
    drafter.backend.failure = ZeroDivisionError("a defect")
    with pytest.raises(SkimError) as caught:
        await drafter.score(PROMPT)
    assert caught.value.reason == "ENGINE_FAULT" and "defect" not in caught.value.message
    drafter.backend.failure = None
    assert spans_of((await drafter.score(PROMPT)).result) == before
    assert (drafter.host.queue.running, drafter.host.queue.queued) == (0, 0)


async def test_silent_caller_is_ended_after_the_idle_time():
    async with running_drafter(idle_timeout_s=0.05) as service:
        call = service.stub.Score()
        await call.write(Request(config=drafter_pb2.ScoreConfig()))
        with pytest.raises(DeadlineExceeded) as caught:
            async with errors_from_peer():
                await call.read()
        assert caught.value.reason == "IDLE_TIMEOUT"


async def test_nothing_is_scored_before_the_model_is_loaded():
    async with running_drafter(start=False) as service:
        for call in (service.score(PROMPT), service.describe()):
            with pytest.raises(Unavailable) as caught:
                async with errors_from_peer():
                    await call
            assert caught.value.reason == "MODEL_LOADING"
            assert caught.value.retry_after_s == 1.0


async def test_beginning_of_sequence_token_counts_but_keeps_no_byte_of_its_own():
    async with running_drafter(model=tiny_model("llama", add_bos=True)) as service:
        tokens = len(service.host.loaded.tokenizer.encode(PROMPT))
        result = (await service.score(PROMPT)).result
        assert result.prompt_tokens == tokens + 1
        check_canonical(spans_of(result), PROMPT)
        assert spans_of(result)[0].begin == 0
        full = await service.score(PROMPT, selection=pb.SelectionConfig(keep_ratio=1.0))
        assert spans_of(full.result) == [Span(0, len(PROMPT))]


async def test_messages_after_the_end_are_ignored(drafter):
    requests = [*messages(PROMPT), messages(PROMPT)[0]]
    call = drafter.stub.Score(iter_async(requests))
    assert [r.WhichOneof("event") async for r in call][-1] == "result"
