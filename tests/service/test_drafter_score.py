"""Scoring over the wire: what a good request gets. (Bad ones: test_drafter_refusals.)"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from drafter_svc.edge import ask_from_proto
from drafter_svc.pipeline import skim, tokenise
from skim.errors import (
    InvalidRequest,
)
from skim.spans import Span, check_canonical
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2
from tests.fixtures.drafter_service import (
    DrafterService,
    long_text,
    messages,
    running_drafter,
    spans_of,
)

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


def kept_text(result: Any, prompt: bytes = PROMPT) -> bytes:
    return b"\n".join(prompt[begin:end] for begin, end in spans_of(result, prompt))


async def test_spans_are_canonical_and_equal_to_the_pipeline_called_directly(drafter):
    config = drafter_pb2.ScoreConfig(selection=pb.SelectionConfig(keep_ratio=0.4))
    answer = await drafter.send(messages(PROMPT, selection=config.selection))
    result, spans = answer.result, spans_of(answer.result, PROMPT)
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
    assert spans_of((await drafter.send(requests)).result, PROMPT) == spans_of(whole, PROMPT)


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
    assert spans_of(result, PROMPT) == [Span(0, len(PROMPT))]
    assert result.kept_tokens == result.prompt_tokens


async def test_protected_range_is_kept_and_rounded_outward(drafter):
    # From the middle of a letter of two bytes to the middle of one of three.
    begin, end = PROMPT.index("ö".encode(), 400) + 1, PROMPT.index("京".encode(), 400) + 1
    protected = [pb.ByteRange(begin=begin, end=end)]
    result = (await drafter.score(PROMPT, protected=protected)).result
    assert any(s.begin < begin and end < s.end for s in spans_of(result, PROMPT))


async def test_forced_chunks_over_the_budget_are_kept_alone(drafter):
    protected = [pb.ByteRange(begin=100, end=1_500)]
    result = (await drafter.score(PROMPT, protected=protected)).result
    assert result.outcome == drafter_pb2.SELECTION_OUTCOME_FORCED_ONLY
    assert result.kept_tokens > 0.3 * result.prompt_tokens
    assert spans_of(result, PROMPT)[0].end >= 1_500


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
    assert any(s.begin <= middle and middle + 20 <= s.end for s in spans_of(result, PROMPT))


async def test_tail_of_the_prompt_is_kept_when_no_query_is_given(drafter):
    bare = pb.SelectionConfig(head_chunks=0, tail_chunks=0, keep_ratio=0.001)
    result = (await drafter.score(PROMPT, selection=bare, protect_tail_tokens=100)).result
    assert 100 <= result.kept_tokens <= 160
    assert spans_of(result, PROMPT)[-1].end == len(PROMPT)


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
    check_canonical(spans_of(result, PROMPT), PROMPT)


async def test_seed_decides_the_random_scorer(drafter):
    def of(seed: int) -> Any:
        scoring = pb.ScoringConfig(scorer="random", seed=seed)
        return drafter.score(PROMPT, scoring=scoring)

    first, again, other = [spans_of((await of(seed)).result, PROMPT) for seed in (1, 1, 2)]
    assert first == again != other


async def test_look_ahead_answers_while_it_fits_and_names_limit_and_got_when_not(drafter):
    scoring = pb.ScoringConfig(lookahead_tokens=2)
    result = (await drafter.score(PROMPT, scoring=scoring)).result
    check_canonical(spans_of(result, PROMPT), PROMPT)
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
