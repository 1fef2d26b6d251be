"""One request from its plan to its last token: queue, engine, answer.

`service.py` calls `answer` once the prompt is tokenised and the plan is checked. `routing` has said
what is prefilled where; here the request waits for its seat, goes to the engine, and the engine's
events become the answer's. Knows no generated message, no socket, and no tokenizer but the decoder
it is handed.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from skim.errors import Busy, EngineFault
from skim.log import get_logger
from target_svc.admission import Admission
from target_svc.answer import AnswerWriter, Decoder
from target_svc.compaction import TokenisedPrompt
from target_svc.memory.full_context import FullContextBudget
from target_svc.messages import Done, KvType, Progress, Ready, Submit, Tokens
from target_svc.prefill_rate import ChunkTimer, PrefillRate
from target_svc.request import Ask, Ended, EndReason, Event, Plan, Prefilled, Started
from target_svc.routing import Route, Router
from target_svc.seat import Engine, EventStream, Room, Seat

log = get_logger()

# Prompts timed at start, shortest first: three octaves show how the cost grows with length.
CALIBRATION_TOKENS = (256, 1_024, 4_096)


@dataclass(frozen=True)
class Job:
    """One request and its prompt; `size_bytes` counts the prompt."""

    ask: Ask
    prompt: TokenisedPrompt
    size_bytes: int
    decoder: Decoder


class RoomMaker(Protocol):
    """Makes GPU memory free for a full context; `memory.landlord.Landlord.room`."""

    def __call__(
        self, num_bytes: int, *, deadline_s: float | None
    ) -> AbstractAsyncContextManager[Room]: ...


class Pipeline:
    """Answers requests on one engine.

    Args:
        engine: the engine's client, started.
        facts: what the engine said about its model; the same after each of its restarts.
        admission: the lanes before the engine.
        budget: of the full context.
        rate: learns from every prefill that runs alone.
        kept_max: prompt tokens that fit a slot of the working context.
        kv_type: of the full context.
        flush_s: how long tokens are joined into one piece.
        room: makes memory free for a full context; None: nobody shares it with us.
    """

    def __init__(
        self,
        engine: Engine,
        facts: Ready,
        *,
        admission: Admission,
        budget: FullContextBudget,
        rate: PrefillRate,
        kept_max: int,
        kv_type: KvType,
        flush_s: float,
        room: RoomMaker | None = None,
    ) -> None:
        self._engine = engine
        self.facts = facts
        self._admission = admission
        self._budget = budget
        self._kept_max = kept_max
        self._kv_type = kv_type
        self._flush_s = flush_s
        self._room = room
        self._numbers = itertools.count()
        self._leaving: set[asyncio.Task[None]] = set()
        self.rate = rate
        self.router = Router(facts, budget, kept_max=kept_max)

    async def answer(self, job: Job, plan: Plan) -> AsyncGenerator[Event, None]:
        """Answer one prompt; close the generator to stop.

        Raises:
            Busy: QUEUE_FULL, or FULL_PREFILL_IMPOSSIBLE.
            DeadlineExceeded: the deadline passed while waiting, or in the engine.
            Unavailable: the engine died while it had the request.
        """
        routes = self.router.routes(job.ask, job.prompt, job.size_bytes, plan)
        begin_s = time.monotonic()
        for number, route in enumerate(routes, start=1):
            seat = Seat(self._engine, self._admission.enter(route.lane, job.ask.deadline_s))
            try:
                async for queued in seat.turns():
                    yield queued
                if await self._make_context(seat, route, job.ask, last=number == len(routes)):
                    stream = await seat.submit(self._submit(job, route))
                    yield _started(route, time.monotonic() - begin_s, seat.park_s)
                    async for event in self._run(job, route, stream):
                        yield event
                    return
            finally:
                self._leave(seat)

    async def calibrate(self, budget_s: float) -> None:
        """Time prefills of rising length until `budget_s` is spent, so that estimates are measured.

        The next length runs only if it is predicted to fit what is left of the time.
        """
        begin_s = time.monotonic()
        for tokens in CALIBRATION_TOKENS:
            left_s = budget_s - (time.monotonic() - begin_s)
            # Before the first measurement nothing is predicted, and the first is short.
            if self.rate.prefill_s(tokens) > left_s or tokens > self._kept_max:
                break
            ids = (np.arange(tokens) % self.facts.n_vocab).astype(np.int32)
            timer = ChunkTimer(self.rate, lambda: 0)
            submit = Submit(f"calibrate-{tokens}", ids, 1, speculate=False)
            async for event in await self._engine.submit(submit):
                timer.at(event.prefilled if isinstance(event, Progress) else tokens)
        log.info("calibrated", seconds=round(time.monotonic() - begin_s, 3))

    async def idle(self) -> None:
        """Wait until every request that ended has given its seat back."""
        while self._leaving:
            await asyncio.wait(self._leaving)

    async def _make_context(self, seat: Seat, route: Route, ask: Ask, *, last: bool) -> bool:
        """Wait for the engine, and give a full route its context; False: try the next route."""
        await self._engine.ready()  # a request that waits outlives the engine's restart
        if route.lane == "working":
            return True
        try:
            cells = self._budget.cells(route.kept.num_tokens, ask.max_tokens)
            if self._room is not None:
                size_bytes = self._budget.size_bytes(cells)
                await seat.take_room(self._room(size_bytes, deadline_s=ask.deadline_s))
            await seat.reserve(cells, self._kv_type)
        except Busy as busy:
            log.warning(
                "full_context_refused",
                request_id=ask.request_id,
                cells=cells,
                reason=busy.reason,
                error=busy.message,
            )
            if last:
                limit_bytes = busy.metadata.get("limit_bytes")
                limit = None if limit_bytes is None else int(limit_bytes)
                raise self.router.impossible(route, limit) from busy
            return False
        return True

    def _submit(self, job: Job, route: Route) -> Submit:
        return Submit(
            # Ours, not the caller's: two callers may choose the same id.
            request_id=str(next(self._numbers)),
            ids=route.kept.ids,
            max_tokens=job.ask.max_tokens,
            sampling=job.ask.sampling,
            positions=route.kept.positions,
            original_ids=job.prompt.ids,
            next_position=route.kept.next_position,
            deadline_monotonic_s=job.ask.deadline_s,
            full=route.lane == "full",
            speculate=job.ask.speculate,
            draft_tokens=job.ask.draft_tokens,
            ignore_eos=job.ask.ignore_eos,
        )

    async def _run(self, job: Job, route: Route, stream: EventStream) -> AsyncIterator[Event]:
        """Turn the engine's events into the answer's."""
        writer = AnswerWriter(job.decoder, job.ask.stops)
        timer = ChunkTimer(self.rate, self._company)
        clock = AnswerClock()
        tokens: Tokens | None = None
        done: Done | None = None
        async for event in stream:
            match event:
                case Progress(prefilled=prefilled, total=total):
                    timer.at(prefilled)
                    yield Prefilled(prefilled, total)
                case Tokens():
                    if tokens is None:
                        timer.at(route.kept.num_tokens)
                    tokens = event
                    clock.token()
                    piece = writer.add(event)
                    if piece.text or piece.tokens:
                        yield piece
                        # What arrives meanwhile becomes one piece; the first never waits.
                        await asyncio.sleep(0.0 if writer.stopped else self._flush_s)
                    if writer.stopped:
                        break
                case Done():
                    done = event
        last = writer.finish()
        if last.text or last.tokens:
            yield last
        yield _ended(job, route, writer, clock, done or tokens)

    def _company(self) -> int | None:
        """A number that stays the same as long as one request has the engine for itself."""
        return self._admission.seatings if self._admission.running == 1 else None

    def _leave(self, seat: Seat) -> None:
        """Give a seat back beside the request: its caller, perhaps gone, need not wait for that."""
        task = asyncio.create_task(seat.leave())
        self._leaving.add(task)
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._leaving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("seat_leave_failed", error=repr(error))


class AnswerClock:
    """When the tokens of one answer came."""

    def __init__(self) -> None:
        self._begin_s = self._first_s = self._last_s = time.monotonic()
        self._any = False

    def token(self) -> None:
        """Note that tokens came now."""
        self._last_s = time.monotonic()
        if not self._any:
            self._first_s, self._any = self._last_s, True

    @property
    def prefill_s(self) -> float:
        """From the engine's taking the request to the first token."""
        return self._first_s - self._begin_s

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return self._last_s - self._first_s


def _started(route: Route, wait_s: float, park_s: float) -> Started:
    return Started(
        route.kept.num_tokens,
        route.original,
        route.degraded,
        queue_s=wait_s - park_s,
        map_s=route.map_s,
        park_s=park_s,
    )


def _ended(
    job: Job, route: Route, writer: AnswerWriter, clock: AnswerClock, counts: Done | Tokens | None
) -> Ended:
    """Sum an answer up; one that a stop text ended has no Done, and our own clock tells its times.

    Raises:
        EngineFault: the engine ended the answer without a word.
    """
    if counts is None:
        raise EngineFault("the engine ended an answer without tokens and without Done")
    done = counts if isinstance(counts, Done) else None
    reason: EndReason = "length"
    if writer.stopped:
        reason = "stop_text"
    elif done is not None and done.reason == "stop":
        reason = "eos"
    return Ended(
        reason=reason,
        prompt_bytes=job.size_bytes,
        prompt_tokens=job.prompt.num_tokens,
        kept_tokens=route.kept.num_tokens,
        completion_tokens=writer.num_tokens,
        draft_tokens=counts.draft_tokens,
        accepted_tokens=counts.accepted_tokens,
        steps=counts.steps,
        prefill_s=done.prefill_s if done else clock.prefill_s,
        decode_s=done.decode_s if done else clock.decode_s,
        seed=job.ask.sampling.seed,
        speculation="ngram" if counts.draft_tokens else "",
    )
