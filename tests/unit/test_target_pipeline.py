"""One request through the pipeline, on an engine that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import numpy as np
import pytest

from skim.errors import Busy, PreconditionFailed, Unavailable
from skim.spans import Span
from target_svc.memory.full_context import RESERVE_BYTES
from target_svc.messages import Progress, Tokens
from target_svc.pipeline import Pipeline
from target_svc.request import Ended, Event, Piece, Plan, Prefilled, Queued, Started
from target_svc.sampling import Sampling
from tests.fixtures.pipeline import (
    GAPS,
    TRAINED,
    WHOLE,
    FakeEngine,
    FakeRoom,
    done,
    job,
    make,
    only,
    play,
    texts,
    tokens,
)


async def test_a_short_full_plan_runs_whole_in_the_working_context() -> None:
    engine = FakeEngine([Progress("", 4, 6), tokens(97), tokens(98), done(2, "stop")])
    events = await play(make(engine)[0], job(6))
    assert [type(event) for event in events] == [Started, Prefilled, Piece, Piece, Ended]
    assert texts(events) == "ab" and only(events, Ended).reason == "eos"
    assert engine.submits[0].ids.tolist() == [100, 101, 102, 103, 104, 105]
    assert engine.log == ["submit"]


async def test_a_skim_plan_prefills_its_tokens_and_drafts_from_the_whole_prompt() -> None:
    engine = FakeEngine([tokens(97), done(1)])
    events = await play(make(engine)[0], job(20), Plan((Span(2, 4),)))
    assert engine.submits[0].ids.tolist() == [102, 103, 119]
    assert engine.submits[0].positions.tolist() == [0, 1, 2]
    assert len(engine.submits[0].original_ids) == 20
    assert only(events, Started).kept_tokens == 3
    ended = only(events, Ended)
    assert (ended.prompt_tokens, ended.kept_tokens, ended.prompt_bytes) == (20, 3, 20)


async def test_original_positions_are_used_where_the_rope_allows_gaps() -> None:
    engine = FakeEngine([tokens(97), done(1)])
    events = await play(make(engine, GAPS)[0], job(20), Plan((Span(2, 4),)))
    assert engine.submits[0].positions.tolist() == [2, 3, 19]
    assert engine.submits[0].next_position == 20 and only(events, Started).original


async def test_positions_past_the_trained_context_are_compacted_unless_asked_for() -> None:
    for positions, expected in (("auto", 0), ("original", 2)):
        engine = FakeEngine([tokens(97), done(1)])
        request = job(TRAINED, positions=positions)
        await play(make(engine, GAPS)[0], request, Plan((Span(2, 4),)))
        assert engine.submits[0].positions[0] == expected


async def test_original_positions_on_a_plain_rope_are_refused() -> None:
    with pytest.raises(PreconditionFailed) as refused:
        make(FakeEngine())[0].router.require_positions(job(positions="original").ask)
    assert refused.value.reason == "POSITIONS_NOT_SUPPORTED"


async def test_a_long_full_plan_gets_a_full_context_and_gives_it_back() -> None:
    engine = FakeEngine([tokens(97), done(1)])
    events = await play(make(engine)[0], job(20))
    assert engine.log == ["reserve 256", "submit full", "release"]
    assert not only(events, Started).degraded


async def test_a_full_context_asks_for_room_first_and_gives_it_back_last() -> None:
    engine = FakeEngine([tokens(97), done(1)])
    room = FakeRoom(engine)
    events = await play(make(engine, room=room)[0], job(20, deadline_s=1e9))
    assert engine.log == ["room 256", "reserve 256", "submit full", "release", "room left"]
    assert room.deadlines == [1e9]
    started = only(events, Started)
    assert started.park_s == 0.25 and started.queue_s < 0.25


async def test_a_plan_that_fits_the_working_context_asks_for_no_room() -> None:
    engine = FakeEngine([tokens(97), done(1)])
    events = await play(make(engine, room=FakeRoom(engine))[0], job(6))
    assert engine.log == ["submit"] and only(events, Started).park_s == 0.0


async def test_without_room_the_fallback_answers_and_no_context_is_asked_for() -> None:
    engine = FakeEngine([tokens(97), done(1)])
    room = FakeRoom(engine, error=Busy("no room", reason="NO_ROOM"))
    events = await play(make(engine, room=room)[0], job(20), Plan(None, (Span(0, 3),)))
    assert only(events, Started).degraded and engine.log == ["room 256", "submit"]


async def test_without_room_and_fallback_the_refusal_says_what_could_be_had_now() -> None:
    engine = FakeEngine()
    had = {"limit_bytes": str(RESERVE_BYTES + 256)}
    room = FakeRoom(engine, error=Busy("no room", reason="NO_ROOM", metadata=had))
    pipeline, admission = make(engine, room=room, full_max=300)
    with pytest.raises(Busy) as refused:
        await play(pipeline, job(280))
    assert refused.value.reason == "FULL_PREFILL_IMPOSSIBLE"
    assert refused.value.metadata == {"limit": "248", "got": "280"}  # 256 cells, 8 for the answer
    await pipeline.idle()
    assert admission.running == 0


async def test_a_refused_context_gives_its_room_back() -> None:
    engine = FakeEngine([tokens(97), done(1)], reserve_error=Busy("no memory"))
    pipeline, _ = make(engine, room=FakeRoom(engine))
    await play(pipeline, job(20), Plan(None, (Span(0, 3),)))
    assert sorted(engine.log) == ["release", "reserve 256", "room 256", "room left", "submit"]
    assert engine.log.index("release") < engine.log.index("room left")


async def test_a_prompt_past_the_full_limit_is_answered_from_the_fallback_and_says_so() -> None:
    engine = FakeEngine([tokens(97), done(1)])
    events = await play(make(engine, full_max=10)[0], job(20), Plan(None, (Span(0, 3),)))
    assert only(events, Started).degraded
    assert engine.submits[0].ids.tolist() == [100, 101, 102, 119]
    assert engine.log == ["submit"]


async def test_a_full_context_that_finds_no_memory_is_answered_from_the_fallback() -> None:
    engine = FakeEngine([tokens(97), done(1)], reserve_error=Busy("no memory"))
    pipeline, admission = make(engine)
    events = await play(pipeline, job(20), Plan(None, (Span(0, 3),)))
    assert only(events, Started).degraded and texts(events) == "a"
    assert sorted(engine.log) == ["release", "reserve 256", "submit"]
    assert admission.running == 0


@pytest.mark.parametrize("full_max", [10, 32])
async def test_without_a_fallback_an_impossible_full_prefill_is_refused(full_max: int) -> None:
    engine = FakeEngine(reserve_error=Busy("no memory"))
    with pytest.raises(Busy) as refused:
        await play(make(engine, full_max=full_max)[0], job(20))
    assert refused.value.reason == "FULL_PREFILL_IMPOSSIBLE"
    assert refused.value.metadata == {"limit": str(full_max), "got": "20"}


async def test_more_kept_tokens_than_a_slot_takes_get_a_full_context() -> None:
    engine = FakeEngine([tokens(97), done(1)])
    await play(make(engine)[0], job(30), Plan((Span(0, 12),)))
    assert engine.submits[0].full and engine.submits[0].ids.size == 13


async def test_a_stop_text_ends_the_answer_and_frees_the_sequence() -> None:
    hold = asyncio.Event()
    script = [tokens(97, 98), tokens(99, 100, draft_tokens=5, accepted_tokens=2, steps=2), hold]
    engine = FakeEngine(script)
    pipeline, admission = make(engine)
    events = await play(pipeline, job(stops=("bc",)))
    ended = only(events, Ended)
    assert texts(events) == "a" and ended.reason == "stop_text"
    assert ended.completion_tokens == 3  # `d` came after the stop was complete
    assert (ended.draft_tokens, ended.accepted_tokens, ended.steps) == (5, 2, 2)
    assert ended.speculation == "ngram"
    assert engine.streams[0].cancelled.is_set() and admission.running == 0


async def test_half_a_code_point_at_the_end_becomes_the_replacement_character() -> None:
    events = await play(make(FakeEngine([tokens(97, 0), done(2)]))[0], job())
    assert texts(events) == "a\ufffd"


async def test_logprobs_travel_with_their_tokens() -> None:
    scored = Tokens(
        "",
        np.array([97, 98], np.int32),
        np.array([-0.5, -1.0], np.float32),
        np.array([97, 7, 98, 8], np.int32),
        np.array([-0.5, -2.0, -1.0, -3.0], np.float32),
    )
    events = await play(make(FakeEngine([scored, done(2)]))[0], job())
    (piece,) = (event for event in events if isinstance(event, Piece))
    assert [token.logprob for token in piece.tokens] == [-0.5, -1.0]
    assert [[top.token_id for top in token.top] for token in piece.tokens] == [[97, 7], [98, 8]]


async def test_the_seed_is_reported() -> None:
    request = job(sampling=Sampling(seed=1 << 63))
    events = await play(make(FakeEngine([tokens(97), done(1)]))[0], request)
    assert only(events, Ended).seed == 1 << 63


async def test_the_second_request_waits_for_the_first_and_hears_of_it() -> None:
    hold = asyncio.Event()
    engine = FakeEngine([hold, tokens(97), done(1)], [tokens(98), done(1)])
    pipeline, _ = make(engine)
    first = asyncio.create_task(play(pipeline, job()))
    await until(lambda: engine.log == ["submit"])
    second = pipeline.answer(job(), WHOLE)
    assert await anext(second) == Queued(0, 1)
    hold.set()
    rest = [event async for event in second]
    assert texts(rest) == "b" and only(rest, Started).queue_s > 0.0
    await first


async def test_closing_an_answer_cancels_the_engine_and_seats_the_next() -> None:
    engine = FakeEngine([tokens(97), asyncio.Event()], [tokens(98), done(1)])
    pipeline, admission = make(engine)
    async with aclosing(pipeline.answer(job(), Plan(None))) as events:
        async for event in events:
            if isinstance(event, Piece):
                break
    assert texts(await play(pipeline, job())) == "b"
    assert engine.streams[0].cancelled.is_set() and admission.running == 0


async def test_a_cancelled_task_gives_its_full_context_back() -> None:
    engine = FakeEngine([Progress("", 4, 20), asyncio.Event()])
    pipeline, admission = make(engine)
    task = asyncio.create_task(play(pipeline, job(20)))
    await until(lambda: "submit full" in engine.log)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await pipeline.idle()
    assert engine.log[-1] == "release" and admission.running == 0


async def test_a_dead_engine_fails_its_request_alone() -> None:
    gone = Unavailable("gone", reason="ENGINE_RESTARTED")
    engine = FakeEngine([tokens(97), gone], [tokens(98), done(1)])
    pipeline, _ = make(engine)
    with pytest.raises(Unavailable):
        await play(pipeline, job())
    assert texts(await play(pipeline, job())) == "b"


async def test_one_more_than_may_wait_is_refused_before_the_engine_hears_of_it() -> None:
    engine = FakeEngine([asyncio.Event()])
    pipeline, _ = make(engine, queue_limit=0)
    task = asyncio.create_task(play(pipeline, job()))
    await until(lambda: engine.log == ["submit"])
    with pytest.raises(Busy) as refused:
        await play_first(pipeline)
    assert refused.value.reason == "QUEUE_FULL" and len(engine.submits) == 1
    task.cancel()


async def play_first(pipeline: Pipeline) -> Event:
    async with aclosing(pipeline.answer(job(), Plan(None))) as events:
        return await anext(events)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)
