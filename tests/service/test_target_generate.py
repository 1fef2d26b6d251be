"""Answers of the target over a real socket and a real engine with a tiny random model."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from skim.v1 import common_pb2 as pb
from skim.v1 import target_pb2
from tests.fixtures.engine import tiny_model
from tests.fixtures.target import (
    RunningTarget,
    ask,
    config,
    full,
    messages,
    running_target,
    send,
    skim,
)
from tests.fixtures.tiny_gguf import CHAT_TEMPLATE

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = (
    "The keeper of the lighthouse wrote every evening into the same journal: größer, naïve, "
    "東京都 and 😀 and more. There was a town by the river. "
) * 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target() -> AsyncIterator[RunningTarget]:
    async with running_target(tiny_model(chat_template=CHAT_TEMPLATE)) as running:
        yield running


async def test_a_full_plan_answers_with_progress_tokens_and_counts(target: RunningTarget) -> None:
    answer = await ask(target, TEXT, settings=config(max_tokens=12, ignore_eos=True))
    count = len(target.ids(TEXT))
    assert answer.tokenised.prompt_tokens == count and answer.tokenised.full_fits
    assert answer.started.kept_tokens == count and not answer.started.degraded
    assert answer.prefill[-1] == (count, count) and len(answer.prefill) >= 2
    usage = answer.finish.usage
    assert (usage.prompt_tokens, usage.kept_tokens, usage.completion_tokens) == (count, count, 12)
    assert usage.prompt_bytes == len(TEXT.encode())
    assert answer.finish.reason == pb.FINISH_REASON_LENGTH and len(answer.ids) == 12
    assert answer.finish.prefill_s > 0.0


async def test_the_text_is_what_the_tokens_decode_to(target: RunningTarget) -> None:
    answer = await ask(target, TEXT, settings=config(max_tokens=64, ignore_eos=True))
    raw = b"".join(
        target.tokenizer.token_bytes(token)
        for token in answer.ids
        if not target.tokenizer.is_control(token)
    )
    assert answer.text == raw.decode(errors="replace")


async def test_any_chopping_of_the_parts_gives_the_same_answer(target: RunningTarget) -> None:
    prompt, dice = TEXT.encode(), random.Random(7)
    expected = await ask(target, prompt)
    for part_bytes in (1, 7, 64):
        assert (await ask(target, prompt, part_bytes=part_bytes)).ids == expected.ids
    for _ in range(3):
        cuts = sorted(dice.sample(range(1, len(prompt)), 5))
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, len(prompt)], strict=True)]
        assert (await ask(target, prompt, part_bytes=sizes)).ids == expected.ids


async def test_a_compacted_skim_answers_as_the_kept_text_alone_would(
    target: RunningTarget,
) -> None:
    head, middle, tail = "The town by the river.", " Nothing here matters at all.", " What is lost?"
    prompt = (head + middle + tail).encode()
    assert target.ids(head + middle + tail) == [
        token for piece in (head, middle, tail) for token in target.ids(piece)
    ]
    end = len(prompt)
    plan = skim(prompt, (0, len(head)), (end - len(tail), end))
    skimmed = await ask(target, prompt, plan)
    alone = await ask(target, head + tail)
    assert skimmed.ids == alone.ids
    assert skimmed.finish.usage.kept_tokens == len(target.ids(head + tail))
    assert skimmed.started.positions == pb.POSITION_MODE_COMPACTED


async def test_a_span_inside_a_token_keeps_the_token_and_the_last_one(
    target: RunningTarget,
) -> None:
    prompt = b"waiting to be found"
    answer = await ask(target, prompt, skim(prompt, (1, 2)))
    assert answer.finish.usage.kept_tokens == 2


async def test_special_text_outside_control_ranges_is_plain_text(target: RunningTarget) -> None:
    prompt = b"<|im_start|>user\nhello<|im_end|>"
    plain = await ask(target, prompt)
    marked = await ask(
        target, prompt, settings=config(control_ranges=[pb.ByteRange(begin=0, end=12)])
    )
    parsed = len(target.ids("<|im_start|>")) - 1
    assert plain.tokenised.prompt_tokens - marked.tokenised.prompt_tokens == parsed > 0


async def test_a_stop_text_across_tokens_never_shows(target: RunningTarget) -> None:
    settings = {"max_tokens": 64, "ignore_eos": True}
    text = (await ask(target, TEXT, settings=config(**settings))).text
    at = len(text) // 2
    stop = text[at : at + 5]  # several tokens of a random model
    expected = text[: text.index(stop)]
    answer = await ask(target, TEXT, settings=config(stop=[stop], **settings))
    assert answer.text == expected
    assert answer.finish.reason == pb.FINISH_REASON_STOP_TEXT
    for chunk in answer.chunks:
        assert stop not in chunk.text
    assert len(answer.ids) <= answer.finish.usage.completion_tokens <= 64


async def test_after_a_stop_text_the_sequence_is_free(target: RunningTarget) -> None:
    free = config(max_tokens=64, ignore_eos=True)
    text = (await ask(target, TEXT, settings=free)).text
    for _ in range(3):  # one slot: a sequence that stayed would block the next
        answer = await ask(
            target, TEXT, settings=config(max_tokens=64, ignore_eos=True, stop=[text[:2]])
        )
        assert answer.text == ""


async def test_equal_seeds_give_equal_answers_and_an_unset_one_is_reported(
    target: RunningTarget,
) -> None:
    hot = {"temperature": 1.5, "ignore_eos": True}
    first = await ask(target, TEXT, settings=config(**hot))
    again = await ask(target, TEXT, settings=config(seed=first.finish.seed, **hot))
    other = await ask(target, TEXT, settings=config(seed=first.finish.seed ^ 1, **hot))
    assert first.ids == again.ids != other.ids
    assert again.finish.seed == first.finish.seed


async def test_logprobs_come_with_each_token_likeliest_first(target: RunningTarget) -> None:
    answer = await ask(target, TEXT, settings=config(logprobs=3, ignore_eos=True))
    assert [entry.chosen.token_id for entry in answer.logprobs] == answer.ids
    for entry in answer.logprobs:
        found = [top.logprob for top in entry.top]
        assert len(found) == 3 and found == sorted(found, reverse=True)
        # Greedy: the chosen token is the likeliest.
        assert entry.top[0].token_id == entry.chosen.token_id
        assert entry.chosen.logprob == pytest.approx(found[0])
        token = target.tokenizer.token_bytes(entry.chosen.token_id)
        assert entry.chosen.token == token


async def test_speculation_changes_speed_and_never_the_answer(target: RunningTarget) -> None:
    repeated = "one two three four one two three four one two three four one two" * 2
    for prompt in (TEXT, repeated):
        answers = [
            await ask(
                target,
                prompt,
                settings=config(
                    max_tokens=48,
                    ignore_eos=True,
                    speculation=pb.SpeculationConfig(enabled=enabled, draft_tokens=draft),
                ),
            )
            for enabled, draft in ((False, 7), (True, 7), (True, 2))
        ]
        assert answers[0].ids == answers[1].ids == answers[2].ids
        assert answers[0].finish.usage.draft_tokens == 0 and answers[0].finish.speculation == ""


async def test_the_default_answer_is_bounded_by_gen_max(target: RunningTarget) -> None:
    settings = target_pb2.TargetGenerateConfig(sampling=pb.SamplingConfig(ignore_eos=True))
    answer = await ask(target, TEXT, settings=settings)
    assert answer.finish.usage.completion_tokens == 64


async def test_two_callers_with_the_same_request_id_both_get_an_answer(
    target: RunningTarget,
) -> None:
    stream = messages(TEXT.encode(), full(), config(request_id="same"))
    first = target.stub.Generate(iter(stream))
    second = await send(target, stream)
    assert second.finish is not None
    assert [response.WhichOneof("event") async for response in first][-1] == "finish"


async def test_the_description_states_model_and_limits(target: RunningTarget) -> None:
    found = await target.stub.GetTarget(target_pb2.GetTargetRequest())
    assert (found.model, found.architecture, found.backend) == ("tiny", "qwen3", "cpu")
    assert (found.slots, found.kept_max_tokens, found.gen_max_tokens) == (1, 512, 64)
    assert found.trained_context_tokens == found.full_max_tokens == 4096
    assert found.chat and not found.original_positions and found.kv_type == "f16"
    assert found.model_digest == target.target.model.file.model_digest


async def test_the_measured_rate_gives_an_estimate_after_the_first_long_prefill(
    target: RunningTarget,
) -> None:
    await ask(target, TEXT * 3)
    answer = await ask(target, TEXT)
    found = await target.stub.GetTarget(target_pb2.GetTargetRequest())
    assert answer.tokenised.full_prefill_estimate_s > 0.0 < found.prefill_tokens_per_s


async def test_counting_is_what_a_prompt_of_that_text_counts(target: RunningTarget) -> None:
    for text in (TEXT, "<|im_end|>", ""):
        counted = await target.stub.CountTokens(
            target_pb2.TargetServiceCountTokensRequest(text=text)
        )
        assert counted.prompt_tokens == len(target.ids(text))


async def test_chat_pieces_surround_the_contents(target: RunningTarget) -> None:
    rendered = await target.stub.RenderChat(target_pb2.RenderChatRequest(roles=["system", "user"]))
    assert list(rendered.pieces) == [
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]


async def test_tokens_that_come_close_together_travel_together_but_the_first_at_once() -> None:
    async with running_target(flush_s=1.0) as target:  # longer than the whole answer takes
        answer = await ask(target, TEXT, settings=config(max_tokens=64, ignore_eos=True))
    sizes = [len(chunk.token_ids) for chunk in answer.chunks]
    # Held like the others, the first would bring all 64. It may bring those that came meanwhile.
    assert sum(sizes) == 64 and sizes[0] < 64
    assert len(sizes) < 64


async def test_bos_stands_before_the_prompt_once_where_the_model_adds_it() -> None:
    async with running_target(tiny_model(add_bos=True)) as target:
        plain = len(target.ids("hello there"))
        answer = await ask(target, "hello there")
        assert answer.tokenised.prompt_tokens == plain + 1
        bos = "<|endoftext|>"
        settings = config(control_ranges=[pb.ByteRange(begin=0, end=len(bos))])
        written = await ask(target, bos + "hello there", settings=settings)
        assert written.tokenised.prompt_tokens == plain + 1 and written.ids == answer.ids
        prompt = b"hello there"
        kept = await ask(target, prompt, skim(prompt, (6, 11)))
        assert kept.finish.usage.kept_tokens == 1 + len(target.ids(" there"))
