"""The engine's loop: one thread that makes every llama.cpp call.

Runs in the child's main thread. It takes messages between steps, hands requests to the lane of
their context, creates and frees the full context, and reports load. Refuses a request before it
touches llama.cpp (`check_submit`), more waiting requests than the bound, a second full context, and
one that does not fit the host's free memory.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from skim.errors import Busy, Cancelled, InvalidRequest, PreconditionFailed, SkimError
from skim.log import get_logger
from target_svc.llama.context import KV_BYTES_PER_VALUE, Context
from target_svc.llama.inbox import Inbox
from target_svc.llama.lane import Lane
from target_svc.llama.library import Library
from target_svc.llama.model import Model
from target_svc.llama.sequence import Sequence, check_submit
from target_svc.messages import (
    Cancel,
    EngineConfig,
    Failed,
    FromEngine,
    KvType,
    Load,
    Message,
    Ready,
    Release,
    Released,
    Reserve,
    Reserved,
    ReserveFailed,
    Submit,
)

log = get_logger()
LOAD_INTERVAL_S = 0.5
HOST_RESERVE_BYTES = 256 << 20  # left free beside a new context: compute buffers, and the others


class Engine:
    """A model, its lanes, and the loop over them.

    Args:
        library: the loaded llama.cpp.
        config: as the service sent it.
        inbox: where messages come from and go to.
    Raises:
        ModelFileError: the model cannot be loaded.
        Busy: there is no memory for the working context.
    """

    def __init__(self, library: Library, config: EngineConfig, inbox: Inbox) -> None:
        self._config = config
        self._inbox = inbox
        cores = len(os.sched_getaffinity(0))
        self._threads = config.threads or cores
        self._threads_batch = config.threads_batch or self._threads
        started_s = time.monotonic()
        self._model = Model(library, config.model_path, config.gpu_layers)
        self._eog_ids = self._model.eog_ids()
        self._stop_ids = frozenset(self._eog_ids.tolist())
        self._full: Lane | None = None
        self._working = self._working_lane()
        loaded_s = time.monotonic()
        warm_s, self._kv_bytes_per_cell = self._working.context.warm_up(every_shape=True)
        self._load_sent: Load | None = None
        self._load_sent_s = 0.0
        self._send(self._ready(loaded_s - started_s, warm_s))

    def run(self) -> None:
        """Serve until the service is gone."""
        while not self._inbox.closed:
            busy = any(lane.busy for lane in self._lanes())
            for message in self._inbox.take(wait=not busy):
                self._handle(message)
            for lane in self._lanes():
                lane.step()
            self._report_load()
        log.info("engine_leaves")

    def close(self) -> None:
        """Free contexts, then the model."""
        for lane in self._lanes():
            lane.close()
        self._model.close()

    # What a lane asks of the engine (`lane.Outlet`).

    def send(self, message: FromEngine) -> None:
        """Send a message to the service."""
        self._send(message)

    def fail(self, sequence: Sequence, error: SkimError) -> None:
        """Tell the service that a request failed."""
        self._send_failure(sequence.request_id, error)

    def ended(self, sequence: Sequence) -> None:
        """Forget a request that is done."""
        self._inbox.forget(sequence.request_id)

    def cancelled(self, request_id: str) -> bool:
        """Whether a request's work is unwanted: its Cancel came, or the service is gone."""
        return self._inbox.closed or self._inbox.cancelled(request_id)

    def _lanes(self) -> list[Lane]:
        return [self._working, *([self._full] if self._full else [])]

    def _handle(self, message: Message) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel():
                if not any(s.request_id == message.request_id for s in self._sequences()):
                    self._inbox.forget(message.request_id)  # it ended before its Cancel came
            case Reserve():
                self._reserve(message)
            case Release():
                self._release()
            case _:
                log.error("engine_message_unexpected", kind=type(message).__name__)

    def _submit(self, submit: Submit) -> None:
        try:
            self._lane_for(submit).waiting.append(self._accept(submit))
        except SkimError as error:
            self._send_failure(submit.request_id, error)

    def _accept(self, submit: Submit) -> Sequence:
        lane = self._lane_for(submit)
        if any(s.request_id == submit.request_id for s in self._sequences()):
            raise InvalidRequest("request id is in use", got=submit.request_id)
        if len(lane.waiting) >= self._config.max_waiting:
            raise Busy(
                f"{len(lane.waiting)} requests wait in the engine already", retry_after_s=1.0
            )
        check_submit(submit, self._model, lane.context.cells)
        return Sequence.of(submit, self._stop_ids, can_draft=lane.draft_tokens_max > 0)

    def _lane_for(self, submit: Submit) -> Lane:
        if not submit.full:
            return self._working
        if self._full is None:
            raise PreconditionFailed("no full context is reserved", reason="FULL_NOT_RESERVED")
        return self._full

    def _sequences(self) -> list[Sequence]:
        return [s for lane in self._lanes() for s in (*lane.running, *lane.waiting)]

    def _lane(self, cells: int, slots: int, kv_type: KvType) -> Lane:
        return Lane(
            lambda should_abort: Context(
                self._model,
                self._config,
                cells=cells,
                slots=slots,
                kv_type=kv_type,
                threads=self._threads,
                threads_batch=self._threads_batch,
                should_abort=should_abort,
            ),
            self,
            self._config.draft_tokens_max,
            self._config.deaf_max_s,
        )

    def _working_lane(self) -> Lane:
        config = self._config
        cells = config.slots * (config.kept_max + config.gen_max)
        try:
            return self._lane(cells, config.slots, config.kv_type)
        except Busy as busy:
            raise Busy(
                f"{busy.message}; the working context is slots x (kept_max + gen_max) = {cells} "
                "cells: lower one of them, or choose a smaller kv_type",
                reason=busy.reason,
            ) from busy

    def _reserve(self, reserve: Reserve) -> None:
        started_s = time.monotonic()
        try:
            if self._full is not None:
                raise PreconditionFailed("a full context exists", reason="FULL_RESERVED")
            if reserve.cells < 1:
                raise InvalidRequest.field_value("cells", reserve.cells, ">= 1")
            self._require_memory(reserve)
            lane = self._lane(reserve.cells, 1, reserve.kv_type)
        except SkimError as error:
            self._send(ReserveFailed(type(error).__name__, error.reason, error.message))
            return
        created_s = time.monotonic()
        self._full = lane
        warm_s, _ = lane.context.warm_up()
        self._send(Reserved(lane.context.cells, created_s - started_s, warm_s))

    def _require_memory(self, reserve: Reserve) -> None:
        """Refuse a context on the host that would send the machine into swap or the OOM killer."""
        if self._model.gpu:
            return  # the service's landlord counts GPU bytes before it asks
        per_value, working = KV_BYTES_PER_VALUE, self._working.context
        scale = per_value[reserve.kv_type] / per_value[self._config.kv_type]
        needed = int(reserve.cells * self._kv_bytes_per_cell * scale) + HOST_RESERVE_BYTES
        # The graph's mask has two bytes for each cell and token of a batch; the rest is fixed.
        if working.buffers.scratch:
            more_cells = max(0, reserve.cells - working.cells)
            needed += working.buffers.scratch + more_cells * 2 * working.n_batch
        available = host_available_bytes()
        if needed > available:
            raise Busy(
                f"a full context of {reserve.cells} cells needs {needed} bytes, "
                f"{available} are free",
                reason="CONTEXT_MEMORY",
                got=needed,
                allowed=available,
            )

    def _release(self) -> None:
        if self._full is not None:
            self._full.fail_all(Cancelled("the full context was released"))
            self._full.close()
            self._full = None
        self._send(Released())

    def _send(self, message: FromEngine) -> None:
        self._inbox.send(message)

    def _send_failure(self, request_id: str, error: SkimError) -> None:
        self._inbox.forget(request_id)
        self._send(Failed(request_id, type(error).__name__, error.reason, error.message))

    def _report_load(self) -> None:
        """Send Load when who runs or waits has changed, else at most twice a second."""
        sequences = [*self._sequences()]
        running = [s for s in sequences if s.slot >= 0]
        load = Load(
            running=len(running),
            waiting=len(sequences) - len(running),
            decoding=sum(not s.prefilling for s in running),
            cells_used=self._working.cells_used,
            cells=self._working.context.cells,
            full_cells=self._full.context.cells if self._full else 0,
            prefill_tokens_per_s=max(lane.prefill_rate.tokens_per_s for lane in self._lanes()),
            decode_tokens_per_s=max(lane.decode_rate.tokens_per_s for lane in self._lanes()),
        )
        last, now_s = self._load_sent, time.monotonic()
        changed = last is None or _counts(last) != _counts(load)
        if changed or (load != last and now_s - self._load_sent_s > LOAD_INTERVAL_S):
            self._load_sent, self._load_sent_s = load, now_s
            self._send(load)

    def _ready(self, load_s: float, warm_s: float) -> Ready:
        model, config, context = self._model, self._config, self._working.context
        return Ready(
            architecture=model.architecture,
            description=model.description,
            n_vocab=model.n_vocab,
            n_ctx_train=model.n_ctx_train,
            n_layer=model.n_layer,
            n_embd=model.n_embd,
            model_bytes=model.size_bytes,
            parameters=model.parameters,
            rope_type=model.rope_type,
            allows_gaps=model.allows_gaps,
            can_rollback=context.can_rollback,
            recurrent=model.recurrent,
            gpu=model.gpu,
            slots=config.slots,
            cells=context.cells,
            cells_per_slot=config.kept_max + config.gen_max,
            kv_bytes_per_cell=self._kv_bytes_per_cell,
            n_batch=context.n_batch,
            threads=self._threads,
            load_s=load_s,
            warm_s=warm_s,
            eog_ids=self._eog_ids,
            state_bytes_per_slot=context.buffers.states // config.slots,
            scratch_bytes=context.buffers.scratch,
        )


def _counts(load: Load) -> tuple[int, ...]:
    return (load.running, load.waiting, load.decoding, load.cells_used, load.full_cells)


def host_available_bytes() -> int:
    """Bytes the kernel would give away without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62
