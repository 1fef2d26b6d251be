"""Reach one request's plan: follow the drafter, run the late clock, send the decision once.

The I/O around `plan.Planner`, between the drafter's leg and the target's. A failure of the drafter
becomes a full prefill, except where it refuses what the caller asked for, or where no time is left
for a full prefill either. Spans are checked here, so that none that is not canonical goes further.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from gateway.clients import DrafterLeg
from gateway.outbox import Outbox
from gateway.plan import Full, Planner, Reason
from gateway.report import Report
from gateway.request import Ask
from gateway.tee import Tee
from gateway.upload import Upload
from skim.errors import DeadlineExceeded, EngineFault, InvalidRequest, SkimError
from skim.log import get_logger
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2, target_pb2
from skim.wire import spans_from_proto

# Parts of the caller's config that only the drafter can judge.
CALLERS_FIELDS = ("config.selection", "config.scoring")


class Verdict:
    """What is decided about one request, and the wait for it.

    Args:
        ask: what is asked.
        upload: the prompt, complete once `uploaded` was called.
        planner: decides.
        tee: holds both legs.
        outbox: takes the drafter's progress.
        report: takes notes.
    """

    def __init__(
        self,
        ask: Ask,
        upload: Upload,
        planner: Planner,
        tee: Tee,
        outbox: Outbox,
        report: Report,
    ) -> None:
        self._ask = ask
        self._upload = upload
        self._planner = planner
        self._tee = tee
        self._outbox = outbox
        self._report = report
        self._uploaded = asyncio.Event()
        self._news = asyncio.Event()  # the planner was told something

    def uploaded(self) -> None:
        """The whole prompt was checked and sent on."""
        score_open = self._tee.drafter_leg is not None
        self._planner.uploaded(time.monotonic(), score_open=score_open)
        self._uploaded.set()
        self._news.set()

    def tokenised(self, tokenised: target_pb2.Tokenised) -> None:
        """The target counted the prompt."""
        self._planner.tokenised(tokenised.prompt_tokens, tokenised.full_prefill_estimate_s)
        self._news.set()

    async def follow_drafter(self) -> None:
        """Read the drafter's answer, whatever it is.

        Raises:
            InvalidRequest: the drafter refuses a field of the caller's.
            DeadlineExceeded: no time is left.
        """
        await self._tee.drafter_opened.wait()
        leg = self._tee.drafter_leg
        try:
            if leg is None or not await self._score(leg):
                raise EngineFault("it ended without a result")
        except SkimError as error:
            if self._planner.decision is not None:
                return  # given up already; this is our own cancellation, or too late to matter
            get_logger().warning("score_failed", reason=error.reason, message=error.message)
            if isinstance(error, DeadlineExceeded):
                raise  # a full prefill takes longer still
            if isinstance(error, InvalidRequest) and (error.field or "").startswith(CALLERS_FIELDS):
                raise
            self._planner.score_failed(
                Reason.DRAFTER_FAILED, f"drafter {self._report.drafter!r} failed: {error.message}"
            )
        finally:
            self._news.set()

    async def _score(self, leg: DrafterLeg) -> bool:
        """Read the Score's answer to its result."""
        async for response in leg.responses():
            match response.WhichOneof("event"):
                case "progress":
                    if response.progress.stage in (pb.STAGE_QUEUE, pb.STAGE_MEMORY):
                        self._planner.queued(time.monotonic())
                    else:
                        self._planner.running(time.monotonic())
                    self._news.set()
                    await self._outbox.offer(response.progress)
                case "result":
                    await self._uploaded.wait()
                    self._take_result(response.result)
                    return True
        return False

    def _take_result(self, result: drafter_pb2.ScoreResult) -> None:
        self._report.result = result
        try:
            spans = spans_from_proto(result.spans, self._upload.rendered())
            if not spans:
                raise InvalidRequest.field_value("spans", "no span", "at least one span")
        except InvalidRequest as error:
            get_logger().warning("spans_refused", message=error.message)
            self._planner.score_failed(
                Reason.SPANS_REFUSED, f"the drafter's spans were refused: {error.message}"
            )
            return
        low = None
        if result.outcome == drafter_pb2.SELECTION_OUTCOME_LOW_COVERAGE:
            low = (
                f"the best selection covers {result.coverage:.3f} of the attention, "
                f"{self._ask.selection.coverage:.3f} were asked for"
            )
        self._planner.scored(spans, low_coverage=low)

    async def send_plan(self) -> None:
        """Wait for the decision and send it, once."""
        await self._uploaded.wait()
        while self._planner.decision is None:
            self._news.clear()
            late_at_s = self._planner.late_at_s()
            wait_s = None if late_at_s is None else max(0.0, late_at_s - time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            self._planner.time_passed(time.monotonic())
        decision = self._planner.decision
        self._report.decision = decision
        if isinstance(decision, Full) and self._report.result is None and self._tee.drafter_leg:
            self._report.score_lost_s = time.monotonic() - (self._report.uploaded_s or 0.0)
        await self._tee.plan(decision)
