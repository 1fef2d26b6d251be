"""The schedule of one context: who waits, who runs, and what one step decodes.

The engine has one lane over the working context and one over the full context while there is one.
Each step decodes one verify batch over all sequences that generate, then one prefill chunk of the
sequence that came first, so that a long prompt never stalls the others' tokens for more than a
chunk. Cells are promised at admission (prompt and answer), so a decode never runs out of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import numpy as np

from skim.errors import Cancelled, DeadlineExceeded, SkimError
from target_svc.llama.context import Context, DecodeAborted
from target_svc.llama.pacing import ChunkPacer
from target_svc.llama.sequence import Sequence
from target_svc.messages import FromEngine, Int32s, Progress
from target_svc.sampling import TokenLogprobs
from target_svc.speculative import verify


class Outlet(Protocol):
    """What a lane needs of the engine: a way out, and who was cancelled."""

    def send(self, message: FromEngine) -> None: ...

    def fail(self, sequence: Sequence, error: SkimError) -> None: ...

    def ended(self, sequence: Sequence) -> None: ...

    def cancelled(self, request_id: str) -> bool: ...


class Rate:
    """Tokens per second of recent work: totals that fade, so short chunks do not swing it."""

    FADE = 0.8  # of what came before, at each new measurement

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens = self._tokens * self.FADE + tokens
        self._seconds = self._seconds * self.FADE + seconds

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0 else 0.0


class Lane:
    """Sequences over one context, which it owns.

    Args:
        make_context: called with the lane's abort question, gives the context.
        draft_tokens_max: drafts in a verify batch, for each sequence.
        deaf_max_s: see `ChunkPacer`.
    """

    def __init__(
        self,
        make_context: Callable[[Callable[[], bool]], Context],
        outlet: Outlet,
        draft_tokens_max: int,
        deaf_max_s: float,
    ) -> None:
        self._outlet = outlet
        self._batch_of: list[Sequence] = []  # whose tokens are in the decode that runs now
        self.context = make_context(self._should_abort)
        self.draft_tokens_max = draft_tokens_max if self.context.can_rollback else 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefill_rate, self.decode_rate = Rate(), Rate()
        self._pacer = ChunkPacer(self.context.n_batch, deaf_max_s)

    @property
    def cells_used(self) -> int:
        """Cells promised to running sequences."""
        return sum(sequence.cells for sequence in self.running)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> None:
        """Drop the dead, admit, decode one batch, prefill one chunk."""
        self._bury()
        self._admit()
        if decoding := [s for s in self.running if not s.prefilling]:
            self._guarded(decoding, partial(self._decode, decoding))
        if prefilling := next((s for s in self.running if s.prefilling), None):
            self._guarded([prefilling], partial(self._prefill, prefilling))

    def fail_all(self, error: SkimError) -> None:
        """End every sequence, running or waiting."""
        for sequence in [*self.running, *self.waiting]:
            self._end(sequence)
            self._outlet.fail(sequence, error)

    def close(self) -> None:
        """Free the context; nothing may run any more."""
        self.context.close()

    def _bury(self) -> None:
        for sequence in [*self.running, *self.waiting]:
            if error := self._death_of(sequence):
                self._end(sequence)
                self._outlet.fail(sequence, error)

    def _death_of(self, sequence: Sequence) -> SkimError | None:
        if self._outlet.cancelled(sequence.request_id):
            return Cancelled("the request was cancelled")
        if sequence.expired(time.monotonic()):
            where = "while it waited" if sequence.slot < 0 else "while it ran"
            return DeadlineExceeded(f"the deadline passed {where}")
        return None

    def _should_abort(self) -> bool:
        """Whether nobody wants the decode that runs now; llama.cpp asks this on the CPU."""
        batch = self._batch_of  # empty while a context warms up
        return bool(batch) and all(self._death_of(sequence) is not None for sequence in batch)

    def _admit(self) -> None:
        # In order of arrival: a small request does not overtake a large one that waits for cells.
        free = set(range(self.context.slots)) - {s.slot for s in self.running}
        while self.waiting and free:
            if self.cells_used + self.waiting[0].cells > self.context.cells:
                return
            sequence = self.waiting.popleft()
            sequence.slot = min(free)  # dense slots: llama.cpp groups neighbouring sequence ids
            free.discard(sequence.slot)
            sequence.started_s = time.monotonic()
            self.running.append(sequence)
            self._outlet.send(Progress(sequence.request_id, 0, len(sequence.submit.ids)))

    def _guarded(self, sequences: Iterable[Sequence], work: Callable[[], None]) -> None:
        """Run llama.cpp work; what goes wrong ends the sequences in it and no others."""
        self._batch_of = list(sequences)
        try:
            work()
        except DecodeAborted:
            self._bury()
        except SkimError as error:
            for sequence in self._batch_of:
                if sequence.slot >= 0:
                    self._end(sequence)
                    self._outlet.fail(sequence, error)
        finally:
            self._batch_of = []

    def _prefill(self, sequence: Sequence) -> None:
        ids, begin = sequence.submit.ids, sequence.prefilled
        end = min(begin + self._pacer.tokens, len(ids))
        outputs = np.zeros(end - begin, np.bool_)
        outputs[-1] = end == len(ids)
        started_s = time.monotonic()
        self.context.decode(ids[begin:end], sequence.positions[begin:end], sequence.slot, outputs)
        self._pacer.took(end - begin, self.context.deaf_s)
        self.prefill_rate.add(end - begin, time.monotonic() - started_s)
        sequence.prefilled = end
        self._outlet.send(Progress(sequence.request_id, end, len(ids)))
        if not sequence.prefilling:
            self._emit(sequence, np.zeros(0, np.int32), first_row=end - begin - 1)

    def _decode(self, sequences: list[Sequence]) -> None:
        """One verify batch: each sequence's last token and its drafts, sequence after sequence."""
        drafts = [sequence.draft(self.draft_tokens_max) for sequence in sequences]
        tokens = [
            np.concatenate((np.array([s.last_token], np.int32), d))
            for s, d in zip(sequences, drafts, strict=True)
        ]
        lengths = [len(rows) for rows in tokens]
        positions = [
            np.arange(s.next_position, s.next_position + n, dtype=np.int32)
            for s, n in zip(sequences, lengths, strict=True)
        ]
        slots = np.repeat(np.array([s.slot for s in sequences], np.int32), lengths)
        started_s = time.monotonic()
        self.context.decode(
            np.concatenate(tokens), np.concatenate(positions), slots, np.ones(len(slots), np.bool_)
        )
        first_row, emitted = 0, 0
        for sequence, draft, length in zip(sequences, drafts, lengths, strict=True):
            before = sequence.output_tokens
            # One broken row ends its own sequence, not its neighbours.
            self._guarded([sequence], partial(self._emit, sequence, draft, first_row))
            emitted += sequence.output_tokens - before
            first_row += length
        self.decode_rate.add(emitted, time.monotonic() - started_s)

    def _emit(self, sequence: Sequence, draft: Int32s, first_row: int) -> None:
        """Choose from the rows of one sequence, send, and take wrong drafts out of the cache."""
        sampler, chosen = sequence.sampler, list[TokenLogprobs]()

        def choose(row: int) -> int:
            logits = self.context.row(first_row + row)
            token = sampler.choose(logits)
            if sampler.sampling.top_logprobs is not None:
                chosen.append(sampler.logprobs(logits, token))
            return token

        verified = sequence.last_token >= 0  # else the row is the prompt's last one
        verdict = verify(draft.tolist(), choose, sequence.stop_ids.__contains__)
        sent = sequence.take(verdict, len(draft))
        if sent:
            self._outlet.send(sequence.tokens(sent, chosen[: len(sent)]))
        if verdict.stopped or sequence.output_tokens >= sequence.submit.max_tokens:
            self._end(sequence)
            self._outlet.send(sequence.done("stop" if verdict.stopped else "length"))
            self._outlet.ended(sequence)
        elif verified and len(verdict.emitted) <= len(draft):
            self.context.remove(sequence.slot, sequence.next_position)

    def _end(self, sequence: Sequence) -> None:
        """Take a sequence out and give its cells back."""
        if sequence.slot >= 0:
            self.context.remove(sequence.slot)
            self.running.remove(sequence)
            sequence.slot = -1
        else:
            self.waiting.remove(sequence)
