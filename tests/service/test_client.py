"""Both clients against a gateway on a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

from skim.client import AnswerStream, AsyncClient, Client, Message
from skim.client_types import Answer, Finish, Plan, Text
from skim.errors import Busy, Cancelled, DeadlineExceeded, InvalidRequest, Unavailable
from skim.spans import Span
from tests.fixtures.scripted_services import LONG, WAIT_S, House, house

Result = TypeVar("Result")


async def in_thread(built: House, use: Callable[[Client], Result]) -> Result:
    """Use a sync client in a thread, while the services run in this loop."""

    def work() -> Result:
        with Client(built.address, deadline_s=WAIT_S) as client:
            return use(client)

    return await asyncio.to_thread(work)


def check_answer(answer: Answer) -> None:
    assert answer.text == "The key."
    assert answer.token_ids == (0, 1)
    assert answer.plan.skimmed
    assert answer.finish.reason == "eos"
    assert answer.admitted.model == "tiny"
    assert 0 < answer.finish.ttft_s <= answer.finish.total_s


async def test_sync_generate_returns_the_answer() -> None:
    async with house() as built:
        check_answer(await in_thread(built, lambda client: client.generate(LONG)))


async def test_sync_generate_streams_typed_events() -> None:
    async with house() as built:
        events = await in_thread(
            built, lambda client: list(client.generate(LONG, stream=True, want_spans=True))
        )
    plans = [event for event in events if isinstance(event, Plan)]
    assert [plan.spans for plan in plans] == [(Span(0, 10),)]
    assert [event.text for event in events if isinstance(event, Text)] == ["The ", "key."]
    assert isinstance(events[-1], Finish)


async def test_sync_generate_takes_messages() -> None:
    messages = [Message("system", "Kürzer."), Message("user", LONG.decode())]
    async with house() as built:
        check_answer(await in_thread(built, lambda client: client.generate(messages=messages)))
        assert "Kürzer.".encode() in built.target.calls[0].prompt


async def test_sync_ask_puts_the_document_above_the_question() -> None:
    async with house() as built:
        check_answer(await in_thread(built, lambda client: client.ask("Why?", LONG.decode())))
        prompt = built.target.calls[0].prompt
    assert prompt == (b"<|im_start|>user\n" + LONG + b"\n\nWhy?<|im_end|>\n<|im_start|>assistant\n")


async def test_ask_is_raw_where_the_model_has_no_template() -> None:
    async with house(chat=False) as built:
        await in_thread(built, lambda client: client.ask("Why?", LONG.decode()))
        async with AsyncClient(built.address) as client:
            await client.ask("Why?", LONG.decode())
    assert [call.prompt for call in built.target.calls] == [LONG + b"\n\nWhy?\n"] * 2


async def test_sync_count_tokens_and_models() -> None:
    async with house() as built:
        assert await in_thread(built, lambda client: client.count_tokens("süß")) == 5
        models = await in_thread(built, lambda client: client.models())
    assert models.target.chat
    assert [drafter.name for drafter in models.drafters] == ["mini"]


async def test_sync_errors_are_of_the_tree_with_their_details() -> None:
    async with house(max_requests=1) as built:
        with pytest.raises(InvalidRequest) as refused:
            await in_thread(built, lambda client: client.generate(LONG, keep_ratio=2.0))
        assert refused.value.field == "config.selection.keep_ratio"
        built.target.may_answer.clear()
        async with AsyncClient(built.address) as client:
            async with await client.generate(LONG, stream=True):
                await built.target.opened()
                with pytest.raises(Busy) as busy:
                    await in_thread(built, lambda client: client.generate(LONG))
    assert busy.value.retry_after_s


async def test_sync_deadlines_are_kept() -> None:
    async with house() as built:
        built.drafter.may_answer.clear()
        with pytest.raises(DeadlineExceeded):
            await in_thread(built, lambda client: client.generate(LONG, deadline_s=0.2))


async def test_leaving_a_sync_stream_stops_the_request() -> None:
    freed = threading.Event()
    kept: list[AnswerStream] = []

    def use(client: Client) -> None:
        with client.generate(LONG, stream=True) as stream:
            kept.append(stream)  # nobody else drops the call, nor the connection, before it ends
            next(event for event in stream if isinstance(event, Plan))
        freed.wait(WAIT_S)

    async with house() as built:
        built.target.may_answer.clear()
        using = asyncio.create_task(in_thread(built, use))
        call = await built.target.opened()
        try:
            async with asyncio.timeout(WAIT_S / 2):
                await call.ended.wait()
        finally:
            freed.set()
            await using
    assert call.cancelled


async def test_a_sync_stream_that_is_cancelled_says_so() -> None:
    def use(client: Client) -> None:
        stream = client.generate(LONG, stream=True)
        stream.cancel()
        stream.answer()

    async with house() as built:
        built.target.may_answer.clear()
        with pytest.raises(Cancelled):
            await in_thread(built, use)


def test_a_gateway_that_is_not_there_is_unavailable() -> None:
    with Client("127.0.0.1:1", deadline_s=WAIT_S) as client, pytest.raises(Unavailable):
        client.generate("x")


async def test_async_generate_and_ask_return_answers() -> None:
    async with house() as built, AsyncClient(built.address, deadline_s=WAIT_S) as client:
        check_answer(await client.generate(LONG))
        check_answer(await client.generate(messages=[("user", LONG.decode())]))
        check_answer(await client.ask("Why?", LONG.decode(), system="Kürzer."))
        stream = await client.ask("Why?", LONG.decode(), stream=True)
        check_answer(await stream.answer())


async def test_an_async_stream_that_is_cancelled_says_so() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.may_answer.clear()
        stream = await client.generate(LONG, stream=True)
        await built.target.opened()
        stream.cancel()
        with pytest.raises(Cancelled):
            await stream.answer()


async def test_cancelling_the_task_that_reads_an_async_stream_cancels_the_task() -> None:
    async with house() as built, AsyncClient(built.address) as client:
        built.target.may_answer.clear()
        reading = asyncio.create_task(client.generate(LONG))
        await built.target.opened()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_async_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.models()
