"""Send one rendered prompt to the target and, where it pays, to a drafter.

`session` feeds it. Opens each call as late as it must: the target's with the layout, the drafter's
once the prompt has shown enough bytes; what came before is held until then. A leg that is slow
holds the upload back, a drafter that takes nothing at all is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from gateway.clients import (
    DrafterClient,
    DrafterLeg,
    TargetClient,
    TargetLeg,
    plan_to_proto,
    ranges_to_proto,
)
from gateway.plan import Decision, Full, Planner, Reason
from gateway.rendering import Layout, protected_ranges, query_range
from gateway.request import Ask
from skim.spans import Span
from skim.v1 import common_pb2 as pb
from skim.v1.drafter_pb2 import ScoreConfig, ScoreRequest
from skim.v1.target_pb2 import TargetGenerateConfig, TargetServiceGenerateRequest


class Tee:
    """Both legs of one request.

    Args:
        ask: what is asked.
        request_id: stands in both configs.
        planner: says when a Score is worth opening.
        target: opens the target's leg.
        drafter: opens the drafter's leg, or None.
        left_s: seconds that a call opened now may take; raises when none are left.
        stall_s: how long the drafter may refuse to take the next part.
    """

    def __init__(
        self,
        ask: Ask,
        request_id: str,
        planner: Planner,
        *,
        target: TargetClient,
        drafter: DrafterClient | None,
        left_s: Callable[[], float],
        stall_s: float,
    ) -> None:
        self._ask = ask
        self._request_id = request_id
        self._planner = planner
        self._target = target
        self._drafter = drafter
        self._left_s = left_s
        self._stall_s = stall_s
        self._layout = Layout.raw(0)
        self._held: list[bytes] = []
        self._sent_bytes = 0
        self.target_leg: TargetLeg | None = None
        self.target_opened = asyncio.Event()
        self.drafter_leg: DrafterLeg | None = None
        self.drafter_opened = asyncio.Event()

    async def open(self, layout: Layout, known_bytes: int) -> None:
        """Open the target's leg, and the drafter's if enough bytes are known to come.

        Args:
            layout: where the template's text lies; for a raw prompt its size does not matter.
            known_bytes: bytes that the rendered prompt has at least.
        """
        self._layout = layout
        await self._open_target()
        await self._open_drafter(known_bytes)

    async def put(self, data: bytes) -> None:
        """Send the next rendered bytes to both."""
        part = pb.PromptPart(offset=self._sent_bytes, data=data)
        self._sent_bytes += len(data)
        await self._to_target(TargetServiceGenerateRequest(prompt=part))
        if self.drafter_leg is not None:
            await self._to_drafter(self.drafter_leg, ScoreRequest(prompt=part))
        elif self._drafter is not None and self._planner.decision is None:
            self._held.append(data)
            await self._open_drafter(self._sent_bytes)

    async def end(self, sha256: bytes) -> None:
        """End the prompt on both legs."""
        end = pb.PromptEnd(total_bytes=self._sent_bytes, sha256=sha256)
        await self._to_target(TargetServiceGenerateRequest(end=end))
        if self.drafter_leg is not None:
            await self._to_drafter(self.drafter_leg, ScoreRequest(end=end))
            await self._to_drafter(self.drafter_leg, None)

    async def plan(self, decision: Decision) -> None:
        """Send the plan, the last message to the target; a full prefill ends the Score."""
        if isinstance(decision, Full):
            self.drop_drafter()
        plan = plan_to_proto(decision, self._sent_bytes)
        await self._to_target(TargetServiceGenerateRequest(plan=plan))
        await self._to_target(None)

    async def again(self, parts: Sequence[bytes], decision: Decision) -> None:
        """Ask the target anew, on another call, with the whole prompt and its plan."""
        self.drop_drafter()
        self._sent_bytes = 0
        await self._open_target()
        for data in parts:
            await self.put(data)
        await self.end(b"")
        await self.plan(decision)

    def drop_drafter(self) -> None:
        """Stop the Score: its answer is not needed any more."""
        if self.drafter_leg is not None:
            self.drafter_leg.cancel()

    def close(self) -> None:
        """Stop both calls."""
        self.drop_drafter()
        if self.target_leg is not None:
            self.target_leg.cancel()

    async def _open_target(self) -> None:
        ask = self._ask
        self.target_leg = self._target.generate(self._request_id, self._left_s())
        self.target_opened.set()
        config = TargetGenerateConfig(
            request_id=self._request_id,
            model=ask.model,
            sampling=ask.sampling,
            speculation=ask.speculation,
            positions=ask.positions,
            control_ranges=ranges_to_proto(self._control_ranges()),
        )
        await self._to_target(TargetServiceGenerateRequest(config=config))

    async def _open_drafter(self, known_bytes: int) -> None:
        """Open the Score if it is worth it now, and send what was held back for it."""
        if self._drafter is None or not self._planner.opens_score(known_bytes):
            return
        ask, layout = self._ask, self._layout
        leg = self._drafter.score(self._request_id, self._left_s())
        query = query_range(layout, ask.roles, ask.query)
        config = ScoreConfig(
            request_id=self._request_id,
            selection=ask.selection,
            scoring=ask.scoring,
            protected=ranges_to_proto(protected_ranges(layout, ask.roles, ask.protected)),
            query=None if query is None else pb.ByteRange(begin=query.begin, end=query.end),
            protect_tail_tokens=ask.protect_tail_tokens,
            control_ranges=ranges_to_proto(self._control_ranges()),
        )
        self.drafter_leg = leg
        self.drafter_opened.set()
        await self._to_drafter(leg, ScoreRequest(config=config))
        offset = 0
        for data in self._held:
            part = pb.PromptPart(offset=offset, data=data)
            offset += len(data)
            await self._to_drafter(leg, ScoreRequest(prompt=part))
        self._held.clear()

    def _control_ranges(self) -> Sequence[Span]:
        return self._layout.control_ranges() if self._ask.roles else self._ask.control_ranges

    async def _to_target(self, message: TargetServiceGenerateRequest | None) -> None:
        if self.target_leg is not None:
            await self.target_leg.put(message)

    async def _to_drafter(self, leg: DrafterLeg, message: ScoreRequest | None) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await leg.put(message)
        except TimeoutError:
            self._planner.score_failed(
                Reason.DRAFTER_LATE,
                f"the drafter did not take the prompt's next part within {self._stall_s:g} s",
            )
            leg.cancel()
