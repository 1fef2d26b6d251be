"""Tokenise prompts off the event loop, the long ones while their parts still arrive.

The service feeds each part as it comes and asks for the tokens after the last one; by then only the
end of the prompt is left to do. Refuses nothing of its own: the tokenizer refuses what is not text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import Executor

import numpy as np

from modelfile.incremental import IncrementalTokenizer
from modelfile.tokenizer import Tokenizer
from skim.spans import Span
from target_svc.compaction import TokenisedPrompt


class PromptTokeniser:
    """The tokens of one prompt, in the making.

    Args:
        tokenizer: of the model.
        control_ranges: byte ranges that are parsed for special tokens.
        pool: threads to wait in.
    """

    def __init__(
        self, tokenizer: Tokenizer, control_ranges: Iterable[Span], pool: Executor
    ) -> None:
        self._tokenizer = tokenizer
        self._incremental = IncrementalTokenizer(tokenizer, control_ranges)
        self._pool = pool

    def feed(self, data: bytes) -> None:
        """Take the next bytes; returns at once, the work runs on the tokenizer's threads."""
        self._incremental.feed(data)

    async def finish(self) -> TokenisedPrompt:
        """Wait for the tokens of everything that was fed, BOS in front where the model wants it.

        Raises:
            InvalidRequest: the prompt is not UTF-8, or a control range ends past it.
        """
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._pool, self._incremental.finish)
        bos = self._tokenizer.bos_id
        # A chat template may write BOS by itself: one is enough.
        if bos is None or not self._tokenizer.add_bos or text.ids[:1].tolist() == [bos]:
            return TokenisedPrompt(text.ids, text.ends)
        ids = np.concatenate((np.array([bos], np.int32), text.ids))
        ends = np.concatenate((np.zeros(1, np.int64), text.ends))
        return TokenisedPrompt(ids, ends, leading=1)

    def cancel(self) -> None:
        """Drop the pieces that no thread has started on."""
        self._incremental.cancel()
