"""One request, from its first part to its last token: upload, tee, plan, answer.

The body follows the target and passes its answer on; beside it run the upload, the drafter and the
wait for the plan (`verdict`), in one group, so that nothing outlives the request. A failure of the
upload or of the target ends the request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from gateway.admission import Ticket
from gateway.clients import DrafterClient, TargetClient, TargetLeg
from gateway.config import GatewaySettings
from gateway.outbox import Outbox
from gateway.plan import Full, Planner, Reason, Skim
from gateway.report import Report
from gateway.request import Ask
from gateway.tee import Tee
from gateway.upload import Upload
from gateway.verdict import Verdict
from skim.errors import DeadlineExceeded, EngineFault, InvalidRequest, SkimError
from skim.log import get_logger
from skim.v1 import common_pb2 as pb
from skim.v1 import target_pb2
from skim.v1.gateway_pb2 import GenerateRequest, GenerateResponse

# Reads the caller's next message; None at the end of its stream.
ReadNext = Callable[[], Awaitable[GenerateRequest | None]]

# Upload progress is told at most this often.
UPLOAD_PROGRESS_S = 0.05


class Session:
    """One admitted request.

    Args:
        ask: what is asked, checked.
        pieces: the chat template's text around the messages; two empty ones for a raw prompt.
        ticket: its share of the admission.
        settings: of the gateway.
        target: where the answer comes from.
        drafter: whom to ask for spans, or None.
        no_drafter: sentence that says why `drafter` is None.
        deadline_s: when both legs give up, on the monotonic clock.
        outbox: takes the events.
        report: takes notes.
    """

    def __init__(
        self,
        ask: Ask,
        pieces: Sequence[bytes],
        ticket: Ticket,
        settings: GatewaySettings,
        *,
        target: TargetClient,
        drafter: DrafterClient | None,
        no_drafter: str | None,
        deadline_s: float,
        outbox: Outbox,
        report: Report,
    ) -> None:
        self._ask = ask
        self._idle_timeout_s = settings.idle_timeout_s
        self._deadline_s = deadline_s
        self._outbox = outbox
        self._report = report
        self._plan_told = False
        planner = Planner(
            mode=ask.mode,
            skim_min_tokens=settings.skim_min_tokens,
            no_drafter=no_drafter,
            score_timeout_s=settings.score_timeout_s,
        )
        self._upload = Upload(ask, pieces, settings.prompt_max_bytes, ticket.hold)
        self._tee = Tee(
            ask,
            ticket.request_id,
            planner,
            target=target,
            drafter=drafter,
            left_s=self._left_s,
            stall_s=settings.drafter_stall_s,
        )
        self._verdict = Verdict(ask, self._upload, planner, self._tee, outbox, report)

    async def run(self, read: ReadNext) -> None:
        """Serve the request.

        Args:
            read: the caller's messages after the config.
        Raises:
            SkimError: the upload or the target failed.
        """
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(self._receive(read)),
                    group.create_task(self._verdict.follow_drafter()),
                    group.create_task(self._verdict.send_plan()),
                ]
                await self._answer()
                for helper in helpers:
                    helper.cancel()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            self._tee.close()

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0.0:
            raise DeadlineExceeded("the request's deadline passed")
        return left_s

    async def _receive(self, read: ReadNext) -> None:
        """Read the upload to its end and tee it."""
        early = self._upload.early_layout
        if early is not None:
            await self._tee.open(early, early.prompt_bytes)
        told_s = 0.0
        while (message := await self._next(read)).WhichOneof("part") == "prompt":
            for data in self._upload.add(message.prompt):
                await self._tee.put(data)
            if time.monotonic() - told_s > UPLOAD_PROGRESS_S:
                told_s = time.monotonic()
                await self._tell_upload(self._ask.stated_bytes or 0)
        if (got := message.WhichOneof("part")) != "end":
            raise InvalidRequest.field_value("part", got or "nothing", "prompt or end")
        rest = self._upload.finish(message.end)
        self._report.uploaded_s = time.monotonic()
        await self._tell_upload(self._upload.size_bytes)
        if early is None:
            await self._tee.open(self._upload.layout, self._upload.layout.prompt_bytes)
        for data in rest:
            await self._tee.put(data)
        # Chat is rendered on the way, so the caller's digest is not that of what is sent on.
        await self._tee.end(b"" if self._ask.roles else message.end.sha256)
        self._verdict.uploaded()

    async def _next(self, read: ReadNext) -> GenerateRequest:
        idle_s = self._idle_timeout_s
        try:
            async with asyncio.timeout(idle_s):
                message = await read()
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing came for {idle_s:g} s during the upload", reason="UPLOAD_IDLE"
            ) from None
        if message is None:
            raise InvalidRequest.field_value("part", "the end of the stream", "prompt or end")
        return message

    async def _tell_upload(self, total_bytes: int) -> None:
        done = self._upload.size_bytes
        total = max(done, total_bytes) if total_bytes else 0
        await self._outbox.offer(pb.Progress(stage=pb.STAGE_UPLOAD, done=done, total=total))

    async def _answer(self) -> None:
        """Pass the target's answer on; once anew, in full, should it refuse the spans."""
        await self._tee.target_opened.wait()
        try:
            await self._follow(self._tee.target_leg)
        except InvalidRequest as error:
            if not self._refuses_spans(error):
                raise
            get_logger().warning("spans_refused", message=error.message)
            decision = Full(Reason.SPANS_REFUSED, f"the target refused the spans: {error.message}")
            self._report.decision = decision
            await self._tee.again(self._upload.rendered_parts(), decision)
            await self._follow(self._tee.target_leg)

    def _refuses_spans(self, error: InvalidRequest) -> bool:
        named = error.reason == "SPANS_NOT_CANONICAL" or (error.field or "").startswith("plan.skim")
        return named and isinstance(self._report.decision, Skim) and not self._plan_told

    async def _follow(self, leg: TargetLeg | None) -> None:
        if leg is None:
            return
        async for response in leg.responses():
            match response.WhichOneof("event"):
                case "tokenised":
                    await self._tokenised(response.tokenised)
                case "progress":
                    await self._outbox.offer(response.progress)
                case "started":
                    self._report.started = response.started
                    await self._tell_plan()
                case "tokens":
                    await self._tell_plan()
                    if self._report.first_token_s is None:
                        self._report.first_token_s = time.monotonic()
                    await self._outbox.send(GenerateResponse(tokens=response.tokens))
                case "finish":
                    await self._tell_plan()
                    prompt_bytes = self._upload.layout.prompt_bytes
                    finish = self._report.finished(response.finish, prompt_bytes)
                    await self._outbox.send(GenerateResponse(finish=finish))
                    return
        raise EngineFault("the target ended its answer without finishing it")

    async def _tokenised(self, tokenised: target_pb2.Tokenised) -> None:
        self._report.tokenised = tokenised
        self._verdict.tokenised(tokenised)
        count = tokenised.prompt_tokens
        await self._outbox.offer(pb.Progress(stage=pb.STAGE_TOKENISE, done=count, total=count))

    async def _tell_plan(self) -> None:
        """Tell the caller what was decided; before the first token, once."""
        if self._plan_told:
            return
        self._plan_told = True
        summary = self._report.plan_summary(self._upload.layout, want_spans=self._ask.want_spans)
        await self._outbox.send(GenerateResponse(plan=summary))


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that ended the group: the first one, ours before any other."""
    flat: list[BaseException] = []
    pending: list[BaseException] = list(failures.exceptions)
    while pending:
        failure = pending.pop(0)
        if isinstance(failure, BaseExceptionGroup):
            pending += failure.exceptions
        else:
            flat.append(failure)
    return next((failure for failure in flat if isinstance(failure, SkimError)), flat[0])
