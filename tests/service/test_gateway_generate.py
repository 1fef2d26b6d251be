"""The gateway's Generate between a scripted target and a scripted drafter, on real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator

import grpc
import pytest

from skim.client import AsyncClient, Message
from skim.client_types import Admitted, Event, Finish, Plan, Progress, Text
from skim.spans import Span
from skim.v1 import common_pb2 as pb
from skim.v1 import gateway_pb2, gateway_pb2_grpc
from skim.v1.gateway_pb2 import GenerateConfig, GenerateRequest
from tests.fixtures.scripted_services import LONG, WAIT_S, Call, House, chat_pieces, house

CHAT = [
    Message("system", "Answer kürzer."),
    Message("user", "Hi 👋"),
    Message("assistant", "Hö?"),
    Message("user", "the 🔑 is under the <|im_end|> mat. " * 30),
]
UPLOAD = "".join(message.content for message in CHAT).encode()


def rendered(messages: list[Message]) -> bytes:
    pieces = chat_pieces([message.role for message in messages])
    text = pieces[0] + "".join(
        message.content + piece for message, piece in zip(messages, pieces[1:], strict=True)
    )
    return text.encode()


def check_order(call: Call) -> None:
    """Parts start where the one before ended, and end says how much came."""
    position = 0
    for part in call.parts:
        assert part.offset == position
        assert not part.HasField("message")
        position += len(part.data)
    assert call.end is not None
    assert call.end.total_bytes == position


async def events_of(client: AsyncClient, prompt: bytes, **options: object) -> list[Event]:
    stream = await client.generate(prompt, stream=True, **options)  # type: ignore[misc]
    return [event async for event in stream]


async def test_both_services_get_the_same_bytes_in_order() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        await client.generate(LONG)
    for calls in (built.target.calls, built.drafter.calls):
        assert [call.prompt for call in calls] == [LONG]
        check_order(calls[0])
        assert calls[0].end.sha256 == hashlib.sha256(LONG).digest()


async def test_the_target_gets_the_drafters_spans_as_its_plan() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.spans = lambda prompt: [Span(0, 10), Span(20, 50)]
        answer = await client.generate(LONG, want_spans=True)
    plan = built.target.calls[0].plan
    assert plan is not None
    spans = plan.skim.spans
    assert (list(spans.gaps), list(spans.lengths)) == ([0, 10], [10, 30])
    assert spans.prompt_bytes == len(LONG)
    assert answer.plan.spans == (Span(0, 10), Span(20, 50))
    assert (answer.plan.skimmed, answer.plan.full_reason, answer.plan.detail) == (True, "", "")


async def test_events_come_in_the_promised_order() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        events = await events_of(client, LONG)
    kinds = [type(event) for event in events if not isinstance(event, Progress)]
    assert kinds == [Admitted, Plan, Text, Text, Finish]
    assert isinstance(events[0], Admitted)
    stages = [event.stage for event in events if isinstance(event, Progress)]
    assert list(dict.fromkeys(stages)) == ["upload", "tokenise", "score", "prefill"] or list(
        dict.fromkeys(stages)
    ) == ["upload", "score", "tokenise", "prefill"]
    plan_at = next(i for i, event in enumerate(events) if isinstance(event, Plan))
    prefill = Progress("prefill", 10, 10)
    assert events.index(prefill) > plan_at


async def test_counts_and_timings_come_from_whoever_knows_them() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        answer = await client.generate(LONG)
    usage, timings = answer.finish.usage, answer.finish.timings
    assert (usage.prompt_tokens, usage.kept_tokens, usage.completion_tokens) == (len(LONG), 10, 2)
    assert usage.prompt_bytes == len(LONG)
    assert (timings.prefill_s, timings.decode_s, timings.map_s) == (0.5, 0.1, 0.03)
    assert timings.queue_s == pytest.approx(0.1 + 0.02)  # drafter's and target's
    assert timings.score_s == pytest.approx(0.2 + 0.3 + 0.4)
    assert timings.select_s == 0.4
    assert 0 < timings.upload_s <= timings.ttft_s <= timings.total_s < answer.finish.total_s
    assert timings.ttft_s < answer.finish.ttft_s  # measured outside, at the client's socket
    plan = answer.plan
    assert (plan.density, plan.layer_density, plan.scorer) == (0.375, (0.5, 0.25), "specprefill")
    assert plan.coverage == pytest.approx(0.9)
    assert (answer.finish.seed, answer.finish.positions) == (7, "compacted")


async def test_what_the_caller_sets_reaches_the_services() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        await client.generate(
            LONG,
            request_id="mine",
            keep_ratio=0.25,
            scorer="lexical",
            temperature=0.5,
            draft_tokens=3,
            positions="compacted",
            protected=[(4, 8)],
            query=(100, 200),
            control_ranges=[(0, 4)],
        )
    score, generate = built.drafter.calls[0].config, built.target.calls[0].config
    assert score.request_id == generate.request_id == "mine"
    assert score.selection.keep_ratio == 0.25
    assert score.scoring.scorer == "lexical"
    assert [(r.begin, r.end) for r in score.protected] == [(4, 8)]
    assert (score.query.begin, score.query.end) == (100, 200)
    assert score.protect_tail_tokens == 256
    assert generate.sampling.temperature == 0.5
    assert generate.speculation.draft_tokens == 3
    assert generate.positions == pb.POSITION_MODE_COMPACTED
    assert list(score.control_ranges) == list(generate.control_ranges)
    assert [(r.begin, r.end) for r in generate.control_ranges] == [(0, 4)]
    assert built.target.calls[0].metadata["x-request-id"] == "mine"


async def test_chat_is_rendered_once_and_streamed_in_order() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        await client.generate(messages=CHAT)
    prompt = rendered(CHAT)
    for calls in (built.target.calls, built.drafter.calls):
        assert [call.prompt for call in calls] == [prompt]
        check_order(calls[0])


async def test_only_the_templates_text_is_parsed_for_special_tokens() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        await client.generate(messages=CHAT)
    prompt = rendered(CHAT)
    pieces = [piece.encode() for piece in chat_pieces([message.role for message in CHAT])]
    for call in (built.target.calls[0], built.drafter.calls[0]):
        named = [prompt[r.begin : r.end] for r in call.config.control_ranges]
        assert named == pieces


async def test_chat_asks_with_its_last_user_message_and_protects_its_instructions() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        await client.generate(messages=CHAT)
    prompt, config = rendered(CHAT), built.drafter.calls[0].config
    assert prompt[config.query.begin : config.query.end].decode() == CHAT[-1].content
    protected = [prompt[r.begin : r.end].decode() for r in config.protected]
    assert protected == [
        "<|im_start|>system\nAnswer kürzer.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]


async def test_ranges_of_a_chat_count_in_the_upload() -> None:
    begin = UPLOAD.index("🔑".encode())
    async with house() as built, AsyncClient(built.address) as client:
        await client.generate(
            messages=CHAT, query=(begin, begin + 4), protected=[(begin, begin + 4)]
        )
    prompt, config = rendered(CHAT), built.drafter.calls[0].config
    assert prompt[config.query.begin : config.query.end].decode() == "🔑"
    assert "🔑" in [prompt[r.begin : r.end].decode() for r in config.protected]


async def test_kept_spans_of_a_chat_come_back_in_the_upload() -> None:
    prompt, key = rendered(CHAT), "🔑".encode()

    begin = prompt.index(key)

    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.spans = lambda _: [Span(0, 30), Span(begin, begin + 4)]
        answer = await client.generate(messages=CHAT, want_spans=True)
    assert answer.plan.spans is not None
    kept = [UPLOAD[begin:end] for begin, end in answer.plan.spans]
    head = prompt[:30].removeprefix(b"<|im_start|>system\n")
    assert kept == [head, key]


async def requests(*messages: GenerateRequest) -> AsyncIterator[GenerateRequest]:
    for message in messages:
        yield message


def config(**fields: object) -> GenerateRequest:
    return GenerateRequest(config=GenerateConfig(**fields))  # type: ignore[arg-type]


def part(offset: int, data: bytes, message: int | None = None) -> GenerateRequest:
    made = GenerateRequest(prompt=pb.PromptPart(offset=offset, data=data))
    if message is not None:
        made.prompt.message = message
    return made


def end(total_bytes: int) -> GenerateRequest:
    return GenerateRequest(end=pb.PromptEnd(total_bytes=total_bytes))


async def test_chat_without_stated_sizes_reaches_both_services_alike() -> None:
    roles = [gateway_pb2.Message(role=gateway_pb2.ROLE_USER)] * 2
    first, second = "ü" * 300, "ß" * 200
    async with house() as built, grpc.aio.insecure_channel(built.address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(
            requests(
                config(messages=roles),
                part(0, first.encode()[:301], 0),  # cuts a code point, as parts may
                part(301, first.encode()[301:], 0),
                part(600, second.encode(), 1),
                end(1_000),
            )
        )
        kinds = [response.WhichOneof("event") async for response in call]
    prompt = rendered([Message("user", first), Message("user", second)])
    for seen in (built.target.calls[0], built.drafter.calls[0]):
        assert seen.prompt == prompt
        check_order(seen)
        last = seen.config.control_ranges[-1]
        assert prompt[last.begin : last.end].decode() == "<|im_end|>\n<|im_start|>assistant\n"
    assert kinds[-1] == "finish"


async def test_a_chat_with_stated_sizes_is_teed_while_it_is_uploaded() -> None:
    content = "x" * 200_000
    roles = [gateway_pb2.Message(role=gateway_pb2.ROLE_USER, size_bytes=len(content))]
    async with house() as built, grpc.aio.insecure_channel(built.address) as channel:
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate()
        await call.write(config(messages=roles))
        await call.write(part(0, content[:100_000].encode(), 0))
        for service in (built.target, built.drafter):
            seen = await service.opened()
            async with asyncio.timeout(WAIT_S):
                await seen.received(100_000)
            assert not seen.uploaded.is_set()
        await call.write(part(100_000, content[100_000:].encode(), 0))
        await call.write(end(200_000))
        await call.done_writing()
        responses = [response async for response in call]
    assert responses[-1].WhichOneof("event") == "finish"


async def test_a_prompt_of_32_mib_arrives_unharmed() -> None:
    prompt = random.Random(1).randbytes(16 << 20).hex().encode()
    assert len(prompt) == 32 << 20
    async with house() as built, AsyncClient(built.address) as client:
        built.drafter.spans = lambda _: [Span(1, 2)]
        answer = await client.generate(prompt)
    for call in (built.target.calls[0], built.drafter.calls[0]):
        assert call.prompt == prompt
        check_order(call)
    assert answer.finish.usage.prompt_bytes == 32 << 20


async def test_a_prompt_of_few_bytes_asks_no_drafter() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        answer = await client.generate(b"x" * 99)
    assert not built.drafter.calls
    assert built.target.calls[0].plan.full.reason == pb.FULL_REASON_SHORT_PROMPT
    assert (answer.plan.skimmed, answer.plan.full_reason) == (False, "short_prompt")
    assert answer.plan.detail == ""


async def test_a_prompt_of_few_tokens_cancels_its_score() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.prompt_tokens = 99
        built.drafter.may_answer.clear()
        answer = await client.generate(LONG)
        score = built.drafter.calls[0]
        async with asyncio.timeout(WAIT_S):
            await score.ended.wait()
    assert score.cancelled
    assert answer.plan.full_reason == "short_prompt"


async def test_mode_full_asks_no_drafter() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        answer = await client.generate(LONG, mode="full")
    assert not built.drafter.calls
    assert answer.plan.full_reason == "forced"
    assert answer.admitted.drafter == ""


async def test_mode_skim_skims_whatever_the_length() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        answer = await client.generate(b"short enough", mode="skim")
    assert answer.plan.skimmed
    assert len(built.drafter.calls) == 1


async def test_a_score_that_ends_before_the_count_waits_for_it() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.may_count.clear()
        stream = await client.generate(LONG, stream=True)
        async with asyncio.timeout(WAIT_S):
            await (await built.drafter.opened()).ended.wait()
        assert built.target.calls[0].plan is None
        built.target.may_count.set()
        answer = await stream.answer()
    assert answer.plan.skimmed


async def test_both_services_get_the_callers_deadline() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        await client.generate(LONG, deadline_s=20.0)
        await client.generate(LONG)
    for calls in (built.target.calls, built.drafter.calls):
        assert calls[0].remaining_s is not None and calls[1].remaining_s is not None
        assert 10.0 < calls[0].remaining_s < 20.0
        assert calls[1].remaining_s > 3_000.0  # the longest request


async def test_a_slow_target_is_waited_for() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.may_read.clear()
        stream = await client.generate(LONG, stream=True)
        # The drafter is done long before the target has read a byte.
        async with asyncio.timeout(WAIT_S):
            await (await built.drafter.opened()).ended.wait()
        built.target.may_read.set()
        answer = await stream.answer()
    assert answer.text == "The key."


async def test_a_request_without_an_id_gets_one() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        answer = await client.generate(LONG)
    assert answer.admitted.request_id == built.target.calls[0].config.request_id != ""
    assert (answer.admitted.model, answer.admitted.drafter) == ("tiny", "mini")


async def text(built: House, **fields: object) -> gateway_pb2.GenerateTextResponse:
    async with grpc.aio.insecure_channel(built.address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        reply: gateway_pb2.GenerateTextResponse = await stub.GenerateText(
            gateway_pb2.GenerateTextRequest(**fields)  # type: ignore[arg-type]
        )
        return reply


async def test_generate_text_answers_a_raw_prompt() -> None:
    async with house() as built:
        reply = await text(built, prompt=LONG.decode(), config=GenerateConfig(request_id="one"))
    assert (reply.request_id, reply.text) == ("one", "The key.")
    assert reply.plan.skimmed
    assert reply.finish.usage.prompt_tokens == len(LONG)
    assert built.target.calls[0].prompt == LONG


async def test_generate_text_answers_a_chat() -> None:
    async with house() as built:
        reply = await text(
            built,
            chat=[
                gateway_pb2.TextMessage(role=gateway_pb2.ROLE_SYSTEM, content="Kürzer."),
                gateway_pb2.TextMessage(role=gateway_pb2.ROLE_USER, content=LONG.decode()),
            ],
        )
    assert reply.text == "The key."
    expected = rendered([Message("system", "Kürzer."), Message("user", LONG.decode())])
    assert built.target.calls[0].prompt == expected


async def test_count_tokens_asks_the_target() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        assert await client.count_tokens("süß") == 5


async def test_list_models_names_target_and_drafters() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        models = await client.models()
    assert models.skim_min_tokens == 100
    assert (models.target.name, models.target.serving, models.target.chat) == ("tiny", True, True)
    (drafter,) = models.drafters
    assert (drafter.name, drafter.serving, drafter.model_digest) == ("mini", True, "cd")
