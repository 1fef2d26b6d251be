"""The two services behind the gateway, and one leg: a streaming call behind a bounded queue.

`session` puts prompt parts into two legs; each sends at its own pace, and a full queue holds the
caller's upload back. A leg whose call is over swallows what is put into it: why it ended is what
its `responses` raise.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grpc

from gateway.plan import Decision, Reason, Skim
from skim.errors import Cancelled, EngineFault, Unavailable
from skim.rpc_errors import from_rpc_error
from skim.spans import Span
from skim.v1 import (
    common_pb2 as pb,
)
from skim.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
)
from skim.wire import spans_to_proto

# Parts that wait for a slow leg. With parts of at most 1 MiB this bounds a leg to 8 MiB.
QUEUE_PARTS = 8
# Unary questions to a service; generous, since a busy machine answers late but does answer.
ASK_TIMEOUT_S = 10.0
# Hint for callers when a peer is gone: about what a restart and the next look at its health take.
RETRY_S = 2.0

Request = TypeVar("Request")
Response = TypeVar("Response")


class Leg(Generic[Request, Response]):
    """One streaming call and the queue before it, emptied by a task of its own.

    Args:
        call: a fresh stream-stream call.
        peer: whose call it is, for errors: `target` or `drafter`.
    """

    def __init__(self, call: Any, peer: str) -> None:
        self._call = call
        self._peer = peer
        self._queue: asyncio.Queue[Request | None] = asyncio.Queue(QUEUE_PARTS)
        self._sender = asyncio.create_task(self._send())
        self.closed = False

    async def put(self, message: Request | None) -> None:
        """Queue a message, None for the end; waits while the queue is full."""
        if not self.closed:
            await self._queue.put(message)

    async def _send(self) -> None:
        try:
            while (message := await self._queue.get()) is not None:
                await self._call.write(message)
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the call is over; whoever reads the responses learns why
        finally:
            self.closed = True
            while not self._queue.empty():  # lets a waiting `put` return
                self._queue.get_nowait()

    async def responses(self) -> AsyncIterator[Response]:
        """Read what the service answers.

        Raises:
            SkimError: the call failed.
        """
        with _peer_errors(self._peer):
            async for response in self._call:
                yield response

    def cancel(self) -> None:
        """Stop the call; the service frees its work."""
        self.closed = True
        self._sender.cancel()
        self._call.cancel()


TargetLeg = Leg[target_pb2.TargetServiceGenerateRequest, target_pb2.TargetServiceGenerateResponse]
DrafterLeg = Leg[drafter_pb2.ScoreRequest, drafter_pb2.ScoreResponse]


class TargetClient:
    """Calls the target."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = target_pb2_grpc.TargetServiceStub(channel)

    async def describe(self) -> target_pb2.GetTargetResponse:
        """Ask what it serves."""
        request = target_pb2.GetTargetRequest()
        with _peer_errors("target"):
            reply: target_pb2.GetTargetResponse = await self._stub.GetTarget(
                request, timeout=ASK_TIMEOUT_S
            )
        return reply

    async def render_chat(self, roles: Sequence[str], timeout_s: float) -> tuple[bytes, ...]:
        """Fetch the template's text around messages: one piece more than roles.

        Raises:
            SkimError: the target has no template, or one that cannot be streamed.
        """
        request = target_pb2.RenderChatRequest(roles=roles)
        with _peer_errors("target"):
            reply = await self._stub.RenderChat(request, timeout=timeout_s)
        if len(reply.pieces) != len(roles) + 1:
            raise EngineFault(
                f"the target cut its chat template into {len(reply.pieces)} pieces, "
                f"not {len(roles) + 1}"
            )
        return tuple(piece.encode() for piece in reply.pieces)

    async def count_tokens(self, text: str, timeout_s: float) -> int:
        """Count a text's tokens."""
        request = target_pb2.TargetServiceCountTokensRequest(text=text)
        with _peer_errors("target"):
            reply = await self._stub.CountTokens(request, timeout=timeout_s)
        return int(reply.prompt_tokens)

    def generate(self, request_id: str, timeout_s: float) -> TargetLeg:
        """Open a Generate stream."""
        call = self._stub.Generate(timeout=timeout_s, metadata=_metadata(request_id))
        return Leg(call, "target")


class DrafterClient:
    """Calls one drafter."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = drafter_pb2_grpc.DrafterServiceStub(channel)

    async def describe(self) -> drafter_pb2.GetDrafterResponse:
        """Ask what it scores with."""
        request = drafter_pb2.GetDrafterRequest()
        with _peer_errors("drafter"):
            reply: drafter_pb2.GetDrafterResponse = await self._stub.GetDrafter(
                request, timeout=ASK_TIMEOUT_S
            )
        return reply

    def score(self, request_id: str, timeout_s: float) -> DrafterLeg:
        """Open a Score stream."""
        call = self._stub.Score(timeout=timeout_s, metadata=_metadata(request_id))
        return Leg(call, "drafter")


@contextlib.contextmanager
def _peer_errors(peer: str) -> Iterator[None]:
    """Raise a peer's failure as our error inside the body."""
    try:
        yield
    except grpc.aio.AioRpcError as failure:
        said_why = any(
            key == "grpc-status-details-bin" for key, _ in failure.trailing_metadata() or ()
        )
        if failure.code() is grpc.StatusCode.UNAVAILABLE and not said_why:
            # The transport's words name addresses, which are nobody's business out there.
            raise Unavailable(
                f"the {peer} is unreachable",
                reason=f"{peer.upper()}_UNAVAILABLE",
                retry_after_s=RETRY_S,
            ) from failure
        raise from_rpc_error(failure) from failure
    except asyncio.CancelledError:
        # A call that ended as CANCELLED looks like a cancellation of the task that reads it.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Cancelled(f"the {peer}'s call was cancelled") from None


def _metadata(request_id: str) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", request_id),)


def ranges_to_proto(spans: Sequence[Span]) -> list[pb.ByteRange]:
    """Write ranges as messages."""
    return [pb.ByteRange(begin=begin, end=end) for begin, end in spans]


def plan_to_proto(decision: Decision, prompt_bytes: int) -> target_pb2.Plan:
    """Write a decision as the target's plan message."""
    if isinstance(decision, Skim):
        spans = spans_to_proto(decision.spans, prompt_bytes)
        return target_pb2.Plan(skim=target_pb2.SkimPlan(spans=spans))
    full = target_pb2.FullPlan(reason=full_reason_to_proto(decision.reason))
    if decision.fallback is not None:
        full.fallback.CopyFrom(spans_to_proto(decision.fallback, prompt_bytes))
    return target_pb2.Plan(full=full)


_FULL_REASONS = {
    Reason.FORCED: pb.FULL_REASON_FORCED,
    Reason.SHORT_PROMPT: pb.FULL_REASON_SHORT_PROMPT,
    Reason.NO_DRAFTER: pb.FULL_REASON_NO_DRAFTER,
    Reason.DRAFTER_FAILED: pb.FULL_REASON_DRAFTER_FAILED,
    Reason.DRAFTER_LATE: pb.FULL_REASON_DRAFTER_LATE,
    Reason.LOW_COVERAGE: pb.FULL_REASON_LOW_COVERAGE,
    Reason.SPANS_REFUSED: pb.FULL_REASON_SPANS_REFUSED,
}


def full_reason_to_proto(reason: Reason) -> pb.FullReason:
    """Write the reason of a full prefill as the wire's."""
    return _FULL_REASONS[reason]
