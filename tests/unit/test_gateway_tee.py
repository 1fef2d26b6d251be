"""The tee over two scripted calls: order, bounds, and what a slow leg does to the other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.clients import QUEUE_PARTS, Leg
from gateway.edge import ask_from_proto
from gateway.plan import Full, Mode, Planner, Reason, Skim
from gateway.rendering import Layout
from gateway.tee import Tee
from skim.spans import Span
from skim.v1.gateway_pb2 import GenerateConfig

PART = b"x" * 100
MIN = 250


class FakeCall:
    """Takes messages while its gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.written: list[Any] = []
        self.half_closed = asyncio.Event()
        self.cancelled = False
        self.over = False

    async def write(self, message: Any) -> None:
        await self.gate.wait()
        if self.over:
            raise asyncio.InvalidStateError("RPC already finished.")
        self.written.append(message)

    async def done_writing(self) -> None:
        self.half_closed.set()

    def cancel(self) -> None:
        self.cancelled = True

    def prompt(self) -> list[tuple[int, bytes]]:
        parts = [m.prompt for m in self.written if m.WhichOneof("part") == "prompt"]
        return [(part.offset, part.data) for part in parts]

    def kinds(self) -> list[str]:
        return [message.WhichOneof("part") for message in self.written]


class FakeClient:
    """Opens fake calls, as both services' clients do."""

    def __init__(self) -> None:
        self.calls: list[FakeCall] = []
        self.gate_next = False

    def generate(self, request_id: str, timeout_s: float) -> Leg[Any, Any]:
        call = FakeCall()
        if self.gate_next:
            call.gate.clear()
        self.calls.append(call)
        return Leg(call, "target")

    score = generate


class Rig:
    """A tee between two fake clients."""

    def __init__(self, mode: Mode = Mode.AUTO, stall_s: float = 60.0) -> None:
        self.target, self.drafter = FakeClient(), FakeClient()
        self.planner = Planner(mode=mode, skim_min_tokens=MIN)
        self.tee = Tee(
            ask_from_proto(GenerateConfig()),
            "id",
            self.planner,
            target=self.target,  # type: ignore[arg-type]
            drafter=self.drafter,  # type: ignore[arg-type]
            left_s=lambda: 10.0,
            stall_s=stall_s,
        )


async def settle() -> None:
    """Let every task run until it waits for something outside."""
    for _ in range(200):
        await asyncio.sleep(0)


async def test_both_legs_get_config_parts_end_in_order() -> None:
    rig = Rig()
    await rig.tee.open(Layout.raw(0), 0)
    for _ in range(4):
        await rig.tee.put(PART)
    await rig.tee.end(b"digest")
    await settle()
    parts = [(i * 100, PART) for i in range(4)]
    (target,), (drafter,) = rig.target.calls, rig.drafter.calls
    assert target.kinds() == drafter.kinds() == ["config", *["prompt"] * 4, "end"]
    assert target.prompt() == drafter.prompt() == parts
    assert target.written[-1].end.total_bytes == 400
    assert drafter.written[-1].end.sha256 == b"digest"
    assert drafter.half_closed.is_set()
    assert not target.half_closed.is_set()  # its plan is still to come


async def test_the_drafter_is_asked_once_the_bytes_suffice_and_gets_what_came_before() -> None:
    rig = Rig()
    await rig.tee.open(Layout.raw(0), 0)
    await rig.tee.put(PART)
    await rig.tee.put(PART)
    assert not rig.drafter.calls
    await rig.tee.put(PART)
    await settle()
    assert rig.drafter.calls[0].prompt() == [(0, PART), (100, PART), (200, PART)]


async def test_the_drafter_is_asked_at_once_where_the_size_is_known() -> None:
    rig = Rig()
    await rig.tee.open(Layout((b"<", b">"), (MIN,)), MIN + 2)
    assert rig.drafter.calls


async def test_a_short_prompt_asks_no_drafter() -> None:
    rig = Rig()
    await rig.tee.open(Layout.raw(0), 0)
    await rig.tee.put(PART)
    await rig.tee.end(b"")
    assert not rig.drafter.calls


@pytest.mark.parametrize("slow", ["target", "drafter"])
async def test_a_slow_leg_holds_the_upload_back(slow: str) -> None:
    rig = Rig(Mode.SKIM)
    getattr(rig, slow).gate_next = True
    taken = 0

    async def upload() -> None:
        nonlocal taken
        await rig.tee.open(Layout.raw(0), 0)
        for _ in range(100):
            await rig.tee.put(PART)
            taken += 1

    uploading = asyncio.create_task(upload())
    await settle()
    # The queue is full, config included, and one message is in the sender's hand.
    assert taken == QUEUE_PARTS
    getattr(rig, slow).calls[0].gate.set()
    async with asyncio.timeout(10):
        await uploading
    await settle()
    assert taken == 100
    assert len(getattr(rig, slow).calls[0].prompt()) == 100


async def test_a_drafter_that_dies_lets_a_waiting_upload_go_on() -> None:
    rig = Rig(Mode.SKIM)
    rig.drafter.gate_next = True
    sent = QUEUE_PARTS + 20

    async def upload() -> None:
        await rig.tee.open(Layout.raw(0), 0)
        for _ in range(sent):
            await rig.tee.put(PART)

    uploading = asyncio.create_task(upload())
    await settle()
    assert not uploading.done()  # the drafter's queue is full
    rig.drafter.calls[0].over = True
    rig.drafter.calls[0].gate.set()
    async with asyncio.timeout(10):
        await uploading
    await settle()
    assert len(rig.target.calls[0].prompt()) == sent
    assert rig.planner.decision is None  # it did not stall; whoever reads its answer says why


async def test_closing_stops_both_calls() -> None:
    rig = Rig(Mode.SKIM)
    await rig.tee.open(Layout.raw(0), 0)
    rig.tee.close()
    assert rig.target.calls[0].cancelled
    assert rig.drafter.calls[0].cancelled


async def test_a_drafter_that_takes_nothing_is_given_up() -> None:
    rig = Rig(Mode.SKIM, stall_s=0.01)
    rig.drafter.gate_next = True
    async with asyncio.timeout(10):
        await rig.tee.open(Layout.raw(0), 0)
        for _ in range(QUEUE_PARTS + 5):
            await rig.tee.put(PART)
    assert isinstance(rig.planner.decision, Full)
    assert rig.planner.decision.reason is Reason.DRAFTER_LATE
    assert rig.drafter.calls[0].cancelled
    await settle()
    assert len(rig.target.calls[0].prompt()) == QUEUE_PARTS + 5


async def test_a_full_plan_ends_the_score_and_a_skim_plan_does_not() -> None:
    for decision, ends in ((Full(Reason.SHORT_PROMPT), True), (Skim((Span(0, 3),)), False)):
        rig = Rig(Mode.SKIM)
        await rig.tee.open(Layout.raw(0), 0)
        await rig.tee.put(PART)
        await rig.tee.end(b"")
        await rig.tee.plan(decision)
        await settle()
        assert rig.drafter.calls[0].cancelled is ends
        assert rig.target.calls[0].kinds()[-1] == "plan"
        assert rig.target.calls[0].half_closed.is_set()


async def test_asking_again_sends_the_whole_prompt_and_a_full_plan_on_a_new_call() -> None:
    rig = Rig(Mode.SKIM)
    await rig.tee.open(Layout.raw(0), 0)
    await rig.tee.put(PART)
    await rig.tee.end(b"")
    await rig.tee.again([PART[:60], PART[60:]], Full(Reason.SPANS_REFUSED))
    await settle()
    second = rig.target.calls[1]
    assert second.kinds() == ["config", "prompt", "prompt", "end", "plan"]
    assert second.prompt() == [(0, PART[:60]), (60, PART[60:])]
    assert second.written[-1].plan.WhichOneof("kind") == "full"
    assert len(rig.drafter.calls) == 1
