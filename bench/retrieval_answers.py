"""Answers the retrieval table's prompts with the target: whole, and skimmed by given spans.

Drives the engine child directly (greedy, compacted positions), below the wire: what the services
add is tested elsewhere, and the table needs tens of thousands of answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from bench.retrieval_cases import Case, open_target
from skim.spans import Span
from target_svc.compaction import TokenisedPrompt, compact
from target_svc.engine_client import EngineClient
from target_svc.messages import EngineConfig, Submit, Tokens

MAX_ANSWER_TOKENS = 32


class Answerer:
    """One engine child with a working context that takes the longest prompt whole."""

    def __init__(self, model: Path, max_prompt_tokens: int, *, gpu: bool, slots: int) -> None:
        self.tokenizer, self.pieces = open_target(model)
        self._engine = EngineClient(
            EngineConfig(
                model_path=str(model),
                slots=slots,
                kept_max=max_prompt_tokens + 64,
                gen_max=MAX_ANSWER_TOKENS,
                gpu_layers=-1 if gpu else 0,
            )
        )
        self._serial = 0
        self._slots = asyncio.Semaphore(slots)

    async def __aenter__(self) -> Self:
        await self._engine.start()
        await self._engine.ready()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._engine.close()

    async def answer(
        self, case: Case, spans: Sequence[Span] | None, *, original: bool = False
    ) -> bool:
        """Tell whether the answer holds every expected value.

        Args:
            spans: what to prefill; None: everything.
            original: keep the positions of the whole prompt; the model's rope must allow gaps.
        """
        text = self.tokenizer.encode(case.prompt, case.control)
        ids, ends = text.ids.astype(np.int32), text.ends.astype(np.int64)
        whole = [Span(0, len(case.prompt))]
        kept = compact(TokenisedPrompt(ids=ids, ends=ends), spans or whole, original=original)
        self._serial += 1
        submit = Submit(
            request_id=f"case-{self._serial}",
            ids=kept.ids,
            positions=kept.positions,
            next_position=kept.next_position,
            original_ids=ids,
            max_tokens=MAX_ANSWER_TOKENS,
        )
        said: list[bytes] = []
        async with self._slots, await self._engine.submit(submit) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    said += [self.tokenizer.token_bytes(int(token)) for token in event.ids]
        return case.sample.score(b"".join(said).decode("utf-8", "replace")) == 1.0
