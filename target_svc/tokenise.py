"""Tokenise a prompt while its parts still arrive, off the event loop.

The service feeds each part as it comes and asks for the tokens after the last one; by then only the
end of the prompt is left to do. One prompt's parts are worked on one after another, prompts beside
each other in the pool's threads. Refuses nothing: the tokenizer raises what it cannot read.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from target_svc.compaction import TokenisedPrompt


class Incremental(Protocol):
    """A tokenizer of one prompt (`modelfile`'s IncrementalTokenizer)."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the prompt; they may cut a code point."""
        ...

    def finish(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return ids and byte ends of all of it."""
        ...


class PromptTokeniser:
    """The tokens of one prompt, in the making.

    Args:
        incremental: fresh tokenizer of this prompt; used from the pool's threads, one at a time.
        bos_id: token that stands before the text, or None.
        pool: threads to work in.
    """

    def __init__(self, incremental: Incremental, bos_id: int | None, pool: Executor) -> None:
        self._incremental = incremental
        self._bos_id = bos_id
        self._pool = pool
        self._waiting = bytearray()
        self._worker: asyncio.Task[None] | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes; returns at once. Parts that wait are worked on as one."""
        self._waiting += data
        if self._worker is None or self._worker.done():
            self._raise_failure()
            self._worker = asyncio.create_task(self._work())

    async def finish(self) -> TokenisedPrompt:
        """Wait for the tokens of everything that was fed."""
        if self._worker is not None:
            await self._worker
        loop = asyncio.get_running_loop()
        ids, ends = await loop.run_in_executor(self._pool, self._incremental.finish)
        if self._bos_id is None:
            return TokenisedPrompt(ids, ends)
        ids = np.concatenate((np.array([self._bos_id], np.int32), ids))
        ends = np.concatenate((np.zeros(1, np.int32), ends))
        return TokenisedPrompt(ids, ends, leading=1)

    def cancel(self) -> None:
        """Drop what waits. The piece in a thread ends by itself."""
        self._waiting.clear()
        if self._worker is not None:
            self._worker.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            data = bytes(self._waiting)
            self._waiting.clear()
            await loop.run_in_executor(self._pool, self._incremental.feed, data)

    def _raise_failure(self) -> None:
        if self._worker is not None and not self._worker.cancelled():
            if error := self._worker.exception():
                raise error
