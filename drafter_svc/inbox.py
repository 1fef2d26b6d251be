"""Read the messages of one Score stream: config, the prompt's parts, the end.

Used by `service.py` alone. Tokenises what has arrived while the rest is on its way. Refuses a
message out of turn, an end before its time, and silence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor

from drafter_svc.pipeline import Ask, Prompt, check_ranges, make_prompt
from modelfile.incremental import IncrementalTokenizer
from modelfile.tokenizer import Tokenizer
from skim.errors import DeadlineExceeded, InvalidRequest
from skim.v1 import drafter_pb2
from skim.wire import PromptAssembler


class Inbox:
    """One caller's messages.

    Args:
        requests: as they arrive.
        idle_timeout_s: how long the caller may take for the next one.
    """

    def __init__(
        self, requests: AsyncIterator[drafter_pb2.ScoreRequest], idle_timeout_s: float
    ) -> None:
        self._requests = requests
        self._idle_timeout_s = idle_timeout_s

    async def config(self) -> drafter_pb2.ScoreConfig:
        """Read the first message."""
        return (await self._take("config")).config

    async def prompt(
        self, ask: Ask, tokenizer: Tokenizer, max_bytes: int, pool: Executor
    ) -> tuple[Prompt, float]:
        """Read the prompt and tokenise it on the way.

        Args:
            max_bytes: largest prompt.
            pool: threads to wait for the tokenizer in.
        Returns:
            The prompt, and the seconds of tokenising that were left after the last message.
        Raises:
            InvalidRequest, PartOutOfOrder, DigestMismatch, PromptTooLong: see `skim.wire`.
        """
        assembler = PromptAssembler(max_bytes)
        incremental = IncrementalTokenizer(tokenizer, ask.control_ranges)
        try:
            while True:
                message = await self._take("prompt", "end")
                if message.WhichOneof("part") == "end":
                    break
                if message.prompt.HasField("message"):
                    raise InvalidRequest.field_value(
                        "prompt.message", message.prompt.message, "unset"
                    )
                incremental.feed(assembler.add(message.prompt))
            end_s = time.monotonic()
            text = assembler.finish(message.end)
            check_ranges(ask, text)
            loop = asyncio.get_running_loop()
            tokens = await loop.run_in_executor(pool, incremental.finish)
        finally:
            incremental.cancel()
        return make_prompt(text, tokens, tokenizer), time.monotonic() - end_s

    async def _take(self, *due: str) -> drafter_pb2.ScoreRequest:
        allowed = " or ".join(due)
        try:
            message = await asyncio.wait_for(anext(self._requests, None), self._idle_timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing came for {self._idle_timeout_s:g} s while {allowed} was due",
                reason="IDLE_TIMEOUT",
            ) from None
        got = "the end of the stream" if message is None else message.WhichOneof("part")
        if message is None or got not in due:
            raise InvalidRequest.field_value("part", got or "nothing", allowed)
        return message
