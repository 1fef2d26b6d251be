"""Events on their way to a slow caller."""

from __future__ import annotations

import asyncio

from gateway.outbox import OUTBOX_EVENTS, Outbox
from skim.v1 import common_pb2 as pb
from skim.v1.gateway_pb2 import GenerateResponse


def token(index: int) -> GenerateResponse:
    return GenerateResponse(tokens=pb.TokenChunk(text=str(index)))


async def test_a_slow_caller_holds_tokens_back_and_gets_them_all_in_order() -> None:
    outbox = Outbox()
    sent = 0

    async def produce() -> None:
        nonlocal sent
        for index in range(OUTBOX_EVENTS + 10):
            await outbox.send(token(index))
            sent += 1
        outbox.close()

    producer = asyncio.create_task(produce())
    await outbox.get()  # lets the producer run until it has to wait
    await asyncio.wait({asyncio.create_task(outbox.get())})
    assert sent <= OUTBOX_EVENTS + 2
    texts = ["0", "1"]
    while (event := await outbox.get()) is not None:
        texts.append(event.tokens.text)
    assert texts == [str(index) for index in range(OUTBOX_EVENTS + 10)]
    await producer


async def test_a_slow_caller_misses_progress_only() -> None:
    outbox = Outbox()
    for index in range(OUTBOX_EVENTS):
        await outbox.send(token(index))
    async with asyncio.timeout(5):
        await outbox.offer(pb.Progress(done=1))  # returns at once
    outbox.close()
    kinds = []
    while (event := await outbox.get()) is not None:
        kinds.append(event.WhichOneof("event"))
    assert kinds == ["tokens"] * OUTBOX_EVENTS
