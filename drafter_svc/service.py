"""DrafterService on the wire: read a prompt, wait for a turn, run the pass, answer the spans.

The door of the drafter, called by the gateway. What a message must hold is checked in `edge.py`, in
which order messages come in `inbox.py`, what is done with them in `pipeline.py`. Errors leave as
`skim/errors.py` classes: the server maps them to statuses. A caller that goes away leaves the queue
at once, or stops its pass at the next block.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from drafter_svc import pipeline
from drafter_svc.backend import SCORERS, WAITING_FOR_MEMORY
from drafter_svc.drafter import Drafter
from drafter_svc.edge import (
    ask_from_proto,
    progress_to_proto,
    residency_to_proto,
    result_to_proto,
)
from drafter_svc.host import DrafterHost
from drafter_svc.inbox import Inbox
from drafter_svc.pipeline import Ask, Prompt, Skimmed
from drafter_svc.queue import Ticket
from drafter_svc.running_pass import Progress
from drafter_svc.scorers import ATTENTION_SCORERS
from skim.errors import SkimError
from skim.log import get_logger
from skim.timing import Stopwatch
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2, drafter_pb2_grpc

log = get_logger()

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Response = drafter_pb2.ScoreResponse


class DrafterServicer(drafter_pb2_grpc.DrafterServiceServicer):
    """Answers DrafterService for one host."""

    def __init__(self, host: DrafterHost) -> None:
        self._host = host

    async def Score(
        self, requests: AsyncIterator[drafter_pb2.ScoreRequest], context: Context
    ) -> AsyncIterator[Response]:
        """Score one prompt; see the service's description for order and errors."""
        left_s = context.time_remaining()
        deadline_s = None if left_s is None else self._host.queue.clock() + left_s
        inbox = Inbox(requests, self._host.settings.idle_timeout_s)
        request_id = ""
        try:
            with self._host.stream():
                ask = ask_from_proto(await inbox.config(), self._host.settings)
                request_id = ask.request_id
                async with aclosing(self._answer(inbox, ask, deadline_s)) as responses:
                    async for response in responses:
                        yield response
        except SkimError as error:
            log.info("refused", request_id=request_id, reason=error.reason, field=error.field)
            raise
        except asyncio.CancelledError:
            log.info("cancelled", request_id=request_id)
            raise

    async def _answer(
        self, inbox: Inbox, ask: Ask, deadline_s: float | None
    ) -> AsyncGenerator[Response, None]:
        """Take the prompt, take a place in the queue, answer."""
        host, settings = self._host, self._host.settings
        drafter = host.require(ask.model)
        host.queue.check_room()  # before a prompt is uploaded in vain
        prompt, tokenise_s = await inbox.prompt(
            ask, drafter.tokenizer, settings.prompt_max_bytes, host.pool
        )
        pipeline.check_tokens(prompt, settings.prompt_max_tokens)
        watch = Stopwatch()
        watch.add("tokenise", tokenise_s)
        cost = prompt.ids.size if ask.scorer in ATTENTION_SCORERS else 0
        with host.queue.enter(cost, deadline_s) as ticket:
            async with aclosing(self._run(ticket, prompt, ask, watch)) as responses:
                async for response in responses:
                    yield response

    async def _run(
        self, ticket: Ticket, prompt: Prompt, ask: Ask, watch: Stopwatch
    ) -> AsyncGenerator[Response, None]:
        """Wait for the turn, run the pass, yield events and the result."""
        most_ahead = 0
        with watch.stage("queue"):
            async for ahead in ticket.turns():
                most_ahead = max(most_ahead, ahead)
                yield progress_to_proto(pb.STAGE_QUEUE, most_ahead - ahead, most_ahead)
        drafter = self._host.loaded
        if drafter.tokenizer is not prompt.tokenizer:  # swapped while it waited
            self._host.check_name(ask.model)
            with watch.stage("tokenise"):
                prompt = await self._retokenise(prompt, ask)

        def work(stop: threading.Event, progress: Progress) -> Skimmed:
            return pipeline.skim(drafter, prompt, ask, stop=stop, progress=progress)

        running = ticket.start(work)
        async for done, total in running.progress():
            if done == WAITING_FOR_MEMORY:
                yield progress_to_proto(pb.STAGE_MEMORY, 0, 0)
            else:
                yield progress_to_proto(pb.STAGE_SCORE, done, total)
        skimmed = await running.result()
        _log(drafter, prompt, ask, skimmed, watch)
        yield result_to_proto(skimmed, drafter, ask, len(prompt.text), watch)

    async def _retokenise(self, prompt: Prompt, ask: Ask) -> Prompt:
        host = self._host
        loop = asyncio.get_running_loop()
        fresh = await loop.run_in_executor(
            host.pool, pipeline.tokenise, prompt.text, ask, host.loaded.tokenizer
        )
        pipeline.check_tokens(fresh, host.settings.prompt_max_tokens)
        return fresh

    async def GetDrafter(
        self, request: drafter_pb2.GetDrafterRequest, context: Context
    ) -> drafter_pb2.GetDrafterResponse:
        """Describe the drafter that is loaded."""
        host = self._host
        drafter, queue = host.loaded, host.queue
        model = drafter.backend.model
        return drafter_pb2.GetDrafterResponse(
            model=drafter.name,
            model_digest=drafter.model_digest,
            layout_digest=drafter.layout_digest,
            backend=drafter.backend.name,
            architecture=model.architecture,
            layers=model.num_layers,
            max_prompt_tokens=host.settings.prompt_max_tokens,
            trained_context_tokens=model.trained_context_tokens,
            queued=queue.queued,
            queue_limit=queue.limit,
            running=queue.running,
            tokens_per_s=queue.rate.mean,
            residency=residency_to_proto(drafter.residency),
            scorers=SCORERS,
        )


def _log(drafter: Drafter, prompt: Prompt, ask: Ask, skimmed: Skimmed, watch: Stopwatch) -> None:
    log.info(
        "scored",
        request_id=ask.request_id,
        model=drafter.name,
        scorer=ask.scorer,
        prompt_bytes=len(prompt.text),
        prompt_tokens=skimmed.prompt_tokens,
        kept_tokens=skimmed.selection.kept_tokens,
        spans=len(skimmed.spans),
        outcome=skimmed.selection.outcome.value,
        coverage=skimmed.selection.coverage,
        queue_s=watch["queue"],
        tokenise_s=watch["tokenise"],
        memory_s=skimmed.scores.memory_s,
        forward_s=skimmed.forward_s,
        select_s=skimmed.select_s,
    )
