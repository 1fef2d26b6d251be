"""TargetService on the wire: read a stream in order, hand values down, turn events back.

The door of the target's service process; called by the gateway. What a message must hold is
checked in `edge.py`, in which order messages come in `inbox.py`, how a request is answered in
`pipeline.py`. Errors leave as `skim/errors.py` classes: the server maps them to statuses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc
import structlog

from skim.errors import InvalidRequest
from skim.log import get_logger
from skim.v1 import target_pb2, target_pb2_grpc
from skim.wire import PromptAssembler, fit_ranges
from target_svc.compaction import TokenisedPrompt
from target_svc.edge import ask_from_proto, event_to_proto, plan_from_proto
from target_svc.inbox import Inbox, Request
from target_svc.pipeline import Job, Pipeline
from target_svc.request import Ask, Ended
from target_svc.target import RATE_TOKENS, Target

log = get_logger()

Response = target_pb2.TargetServiceGenerateResponse
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

MAX_COUNT_BYTES = 8 << 20
MAX_ROLES = 4_096


class TargetServicer(target_pb2_grpc.TargetServiceServicer):
    """Answers TargetService for one `Target`."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def Generate(
        self, requests: AsyncIterator[Request], context: Context
    ) -> AsyncIterator[Response]:
        """Answer one prompt; see the service's description for order and errors."""
        begin_s = time.monotonic()
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else begin_s + remaining_s
        with self._target.stream() as pipeline:
            inbox = Inbox(requests, self._target.settings.idle_timeout_s)
            try:
                config = (await inbox.take("config")).config
                ask = ask_from_proto(config, self._target.settings, deadline_s=deadline_s)
                pipeline.router.require_positions(ask)
                # Each call runs in a task, hence a context, of its own: nothing to unbind.
                structlog.contextvars.bind_contextvars(request_id=ask.request_id)
                async with aclosing(self._answer(pipeline, inbox, ask)) as responses:
                    async for response in responses:
                        yield response
            finally:
                await inbox.close()

    async def _answer(
        self, pipeline: Pipeline, inbox: Inbox, ask: Ask
    ) -> AsyncGenerator[Response, None]:
        prompt, tokens, tokenise_s = await self._receive(inbox, ask)
        yield Response(tokenised=_tokenised(pipeline, tokens, tokenise_s))
        plan = plan_from_proto((await inbox.take("plan")).plan, prompt)
        inbox.listen()
        job = Job(ask, tokens, len(prompt), self._target.decoder())
        token_bytes = self._target.model.tokenizer.token_bytes
        with _logged(ask, tokens):
            async with aclosing(pipeline.answer(job, plan)) as events:
                async for event in events:
                    inbox.check_silent()
                    yield event_to_proto(event, token_bytes)
                    if isinstance(event, Ended):
                        log.info("answered", **_counts(event))

    async def _receive(self, inbox: Inbox, ask: Ask) -> tuple[bytes, TokenisedPrompt, float]:
        """Take the prompt's parts, tokenising as they come; also the seconds that took after."""
        assembler = PromptAssembler(self._target.settings.prompt_max_bytes)
        tokeniser = self._target.tokeniser(ask.control_ranges)
        try:
            while (message := await inbox.take("prompt", "end")).WhichOneof("part") == "prompt":
                if message.prompt.HasField("message"):
                    raise InvalidRequest.field_value(
                        "prompt.message", message.prompt.message, "unset: the target knows no chat"
                    )
                tokeniser.feed(assembler.add(message.prompt))
            begin_s = time.monotonic()
            prompt = assembler.finish(message.end)
            fit_ranges(ask.control_ranges, "config.control_ranges", prompt)
            tokens = await tokeniser.finish()
        except BaseException:
            tokeniser.cancel()
            raise
        return prompt, tokens, time.monotonic() - begin_s

    async def GetTarget(
        self, request: target_pb2.GetTargetRequest, context: Context
    ) -> target_pb2.GetTargetResponse:
        """Describe the model and its limits."""
        target = self._target
        pipeline = target.require_pipeline()
        settings, facts = target.settings, pipeline.facts
        full_max = pipeline.router.full_max_tokens
        return target_pb2.GetTargetResponse(
            model=settings.model_name,
            model_digest=target.model.digest,
            architecture=target.model.shape.arch,
            backend="cuda" if facts.gpu else "cpu",
            trained_context_tokens=facts.n_ctx_train,
            slots=settings.slots,
            kept_max_tokens=settings.kept_max,
            gen_max_tokens=settings.gen_max,
            full_max_tokens=full_max,
            original_positions=facts.allows_gaps,
            chat=target.model.chat_template is not None,
            kv_type=settings.kv_type,
            prefill_tokens_per_s=target.rate.tokens_per_s(min(RATE_TOKENS, full_max)),
        )

    async def GetLoad(
        self, request: target_pb2.GetLoadRequest, context: Context
    ) -> target_pb2.GetLoadResponse:
        """Report the load."""
        target = self._target
        load = target.engine.load
        return target_pb2.GetLoadResponse(
            queued=target.admission.queued,
            queue_limit=target.settings.queue_limit,
            running=target.admission.running,
            slots=target.settings.slots,
            kv_usage=load.cells_used / load.cells if load.cells else 0.0,
            engine_restarts=target.engine.restarts,
            full_context=target.engine.full is not None,
        )

    async def CountTokens(
        self, request: target_pb2.TargetServiceCountTokensRequest, context: Context
    ) -> target_pb2.TargetServiceCountTokensResponse:
        """Count a text's tokens as a prompt."""
        text = request.text.encode()
        if len(text) > MAX_COUNT_BYTES:
            raise InvalidRequest.field_value(
                "text", f"{len(text)} bytes", f"at most {MAX_COUNT_BYTES} bytes"
            )
        tokeniser = self._target.tokeniser()
        tokeniser.feed(text)
        tokens = await tokeniser.finish()
        return target_pb2.TargetServiceCountTokensResponse(prompt_tokens=tokens.num_tokens)

    async def RenderChat(
        self, request: target_pb2.RenderChatRequest, context: Context
    ) -> target_pb2.RenderChatResponse:
        """Render the chat template around messages whose contents arrive later."""
        count = len(request.roles)
        if not 1 <= count <= MAX_ROLES:
            raise InvalidRequest.field_value("roles", f"{count} roles", f"1 to {MAX_ROLES}")
        pieces = await self._target.render_chat(list(request.roles))
        return target_pb2.RenderChatResponse(pieces=pieces)


def _tokenised(
    pipeline: Pipeline, tokens: TokenisedPrompt, tokenise_s: float
) -> target_pb2.Tokenised:
    return target_pb2.Tokenised(
        prompt_tokens=tokens.num_tokens,
        tokenise_s=tokenise_s,
        full_prefill_estimate_s=pipeline.rate.prefill_s(tokens.num_tokens),
        full_fits=tokens.num_tokens <= pipeline.router.full_max_tokens,
    )


@contextmanager
def _logged(ask: Ask, tokens: TokenisedPrompt) -> Iterator[None]:
    """Say in the log when a caller left before its answer ended."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        log.info("caller_left", prompt_tokens=tokens.num_tokens)
        raise


def _counts(ended: Ended) -> dict[str, Any]:
    return {
        "reason": ended.reason,
        "prompt_tokens": ended.prompt_tokens,
        "kept_tokens": ended.kept_tokens,
        "completion_tokens": ended.completion_tokens,
        "prefill_s": round(ended.prefill_s, 4),
        "decode_s": round(ended.decode_s, 4),
    }
