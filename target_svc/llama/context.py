"""One llama_context: its KV cells, decoding into it, taking tokens back out of it.

The engine owns one working context, made at start, and at most one full context, made on request.
Everything that would make llama.cpp abort the process (GGML_ASSERT) is checked here before each
call and refused with EngineFault: it would be a defect of ours, since requests were checked before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skim.errors import Busy, ConfigError, EngineFault
from target_svc.llama.batch import Batch
from target_svc.llama.model import Model
from target_svc.messages import EngineConfig, Float32s, Int32s, KvType

KV_TYPES: dict[KvType, int] = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type
KV_BYTES_PER_VALUE: dict[KvType, float] = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
CELLS_STEP = 256  # llama.cpp pads a context to it
# A GPU allocates and captures for the shape it will meet; a CPU only has its pages touched.
CPU_WARM_TOKENS = 32
# Chunks of a GPU's first warm-up besides the full one: what the pacer shrinks to, and ends of
# prompts. Each size class has kernels of its own, which the driver loads at their first launch.
GPU_WARM_CHUNKS = (1024, 512, 256, 128, 64, 32, 16)
RC_NO_CELLS, RC_ABORTED = 1, 2


class DecodeAborted(Exception):
    """The abort callback ended a decode; the sequences of the batch must be removed."""


@dataclass(frozen=True)
class ContextBuffers:
    """Bytes that a context took on the device that it runs on, as llama.cpp itself tells them.

    Attributes:
        cells: of the KV cache.
        states: of recurrent layers, all slots together.
        scratch: for the graph, and on a CPU for the rows of logits.
    """

    cells: int
    states: int
    scratch: int

    @classmethod
    def of(cls, made: Mapping[tuple[str, str], int], *, gpu: bool) -> ContextBuffers:
        """Add up; on a GPU what lies on the host (`CPU`, `CUDA_Host`) does not count."""
        by_purpose = {"KV": 0, "RS": 0, "compute": 0, "output": 0}
        for (device, purpose), size_bytes in made.items():
            on_host = device.startswith("CPU") or device.endswith("_Host")
            if purpose in by_purpose and on_host != gpu:
                by_purpose[purpose] += size_bytes
        scratch = by_purpose["compute"] + by_purpose["output"]
        return cls(by_purpose["KV"], by_purpose["RS"], scratch)


class Context:
    """A llama_context with `slots` sequences over `cells` shared KV cells.

    Args:
        should_abort: asked during a decode on the CPU (the only backend that asks).
    Raises:
        ConfigError: settings that llama.cpp would refuse without saying why.
        Busy: llama.cpp could not create it, for want of memory.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        *,
        cells: int,
        slots: int,
        kv_type: KvType,
        threads: int,
        threads_batch: int,
        should_abort: Callable[[], bool],
    ) -> None:
        self.model = model
        self.slots = slots
        self.cells = -(-cells // CELLS_STEP) * CELLS_STEP
        self.n_batch = min(config.n_batch, self.cells)
        self.rows_max = slots * (1 + config.draft_tokens_max)
        self._api = api = model.library.api
        _check_config(config, self.rows_max, self.n_batch, kv_type)
        self._should_abort = should_abort
        self._callback = api.ggml_abort_callback(self._ask)  # must outlive the context
        self._asked_s = 0.0
        self.deaf_s = 0.0  # longest time in the last decode without a question to should_abort
        params = api.llama_context_default_params()
        params.n_ctx = self.cells
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = slots
        params.kv_unified = True  # slots share all cells: a long request may take another's share
        params.n_rs_seq = config.draft_tokens_max if model.recurrent else 0
        params.n_outputs_max = self.rows_max  # the default reserves logits for n_batch rows
        params.n_threads, params.n_threads_batch = threads, threads_batch
        params.flash_attn_type = 1 if config.flash_attention else 0
        params.type_k = params.type_v = KV_TYPES[kv_type]
        params.no_perf = True
        params.abort_callback = self._callback
        model.library.take_errors()
        model.library.take_buffers()
        self._handle: Any = api.llama_init_from_model(model.handle, params)
        if not self._handle:
            said = model.library.take_errors() or "no reason given"
            raise Busy(
                f"llama.cpp cannot create a context of {self.cells} cells: {said}",
                reason="CONTEXT_MEMORY",
            )
        self.buffers = ContextBuffers.of(model.library.take_buffers(), gpu=model.gpu)
        self._memory = api.llama_get_memory(self._handle)
        self._batch = Batch(api, self.n_batch)
        self.can_rollback = not model.recurrent or (
            int(api.llama_n_rs_seq(self._handle)) >= max(1, config.draft_tokens_max)
        )

    def decode(
        self, tokens: Int32s, positions: Int32s, slot_ids: Int32s | int, outputs: NDArray[np.bool_]
    ) -> None:
        """Run [n] tokens, sequence after sequence; rows of `outputs` get logits.

        Raises:
            Busy: no free cells; nothing was changed.
            DecodeAborted: `should_abort` said so; remove the batch's sequences.
            EngineFault: the batch breaks a rule of llama.cpp, or the decode failed.
        """
        self._check(tokens, positions, slot_ids, outputs)
        self._batch.fill(tokens, positions, slot_ids, outputs)
        self._asked_s, self.deaf_s = time.monotonic(), 0.0
        code = int(self._api.llama_decode(self._handle, self._batch.struct))
        if self.model.gpu:
            self._api.llama_synchronize(self._handle)  # else the work has only begun
        self._hear()
        if code == RC_ABORTED:
            raise DecodeAborted
        if code == RC_NO_CELLS:
            raise Busy("the context has no free cells", reason="NO_KV_CELLS", retry_after_s=1.0)
        if code:
            said = self.model.library.take_errors() or "no reason given"
            raise EngineFault(f"llama_decode failed with code {code}: {said}")

    def row(self, index: int) -> Float32s:
        """Logits float32 [n_vocab] of batch row `index`, a view that the next decode overwrites."""
        pointer = self._api.llama_get_logits_ith(self._handle, index)
        if not pointer:
            raise EngineFault(f"row {index} of the last batch has no logits")
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab,))

    def remove(self, slot: int, from_position: int = -1) -> None:
        """Drop a sequence's cells from a position on; -1 drops it all.

        Raises:
            EngineFault: llama.cpp cannot take a part of this sequence back.
        """
        if not 0 <= slot < self.slots:
            raise EngineFault("slot out of range", got=slot, allowed=f"0 to {self.slots - 1}")
        if not self._api.llama_memory_seq_rm(self._memory, slot, from_position, -1):
            raise EngineFault(f"cannot roll slot {slot} back to position {from_position}")

    def last_position(self, slot: int) -> int:
        """Largest position a sequence holds; -1 when it is empty."""
        return int(self._api.llama_memory_seq_pos_max(self._memory, slot))

    def warm_up(self, *, every_shape: bool = False) -> tuple[float, int]:
        """Run one chunk and one verify batch, then forget them.

        Args:
            every_shape: on a GPU, batches of all sizes that have kernels of their own, too. Once
                a process: what they load stays, and is then not taken out of a full device.
        Returns:
            Seconds it took, and the measured bytes that one more token adds to a sequence.
        """
        started_s = time.monotonic()
        size = self._api.llama_state_seq_get_size
        chunk = self.n_batch if self.model.gpu else min(CPU_WARM_TOKENS, self.n_batch)
        chunk = max(1, min(chunk, self.cells - self.rows_max - 1))
        self._warm_decode(0, chunk, rows=1)
        before = int(size(self._handle, 0))
        self._warm_decode(chunk, 1, rows=1)
        bytes_per_token = int(size(self._handle, 0)) - before
        position = chunk + 1
        shapes = [(self.rows_max, self.rows_max)]
        if every_shape and self.model.gpu:
            shapes += [(tokens, 1) for tokens in GPU_WARM_CHUNKS]
            shapes += [(rows, rows) for rows in range(2, self.rows_max)]
        for tokens, rows in shapes:
            if tokens <= min(self.n_batch, self.cells - position):
                self._warm_decode(position, tokens, rows=rows)
                position += tokens
        self._api.llama_memory_clear(self._memory, False)
        return time.monotonic() - started_s, bytes_per_token

    def close(self) -> None:
        """Free the context and all its memory. Idempotent."""
        if self._handle:
            self._api.llama_free(self._handle)
            self._handle = None

    def _ask(self, _: Any) -> bool:
        """llama.cpp's abort callback: on the CPU between any two nodes of the graph."""
        self._hear()
        return self._should_abort()

    def _hear(self) -> None:
        now_s = time.monotonic()
        self.deaf_s = max(self.deaf_s, now_s - self._asked_s)
        self._asked_s = now_s

    def _warm_decode(self, first: int, count: int, rows: int) -> None:
        outputs = np.zeros(count, np.bool_)
        outputs[count - rows :] = True
        positions = np.arange(first, first + count, dtype=np.int32)
        self.decode(np.zeros(count, np.int32), positions, 0, outputs)

    def _check(
        self, tokens: Int32s, positions: Int32s, slot_ids: Int32s | int, outputs: NDArray[np.bool_]
    ) -> None:
        count, slots = len(tokens), np.asarray(slot_ids)
        if not 1 <= count <= self.n_batch:
            raise EngineFault("tokens in a batch", got=count, allowed=f"1 to {self.n_batch}")
        if len(positions) != count or len(outputs) != count or slots.size not in (1, count):
            raise EngineFault("a batch's arrays differ in length")
        if int(outputs.sum()) > self.rows_max:
            raise EngineFault("rows of logits", got=int(outputs.sum()), allowed=self.rows_max)
        if tokens.min() < 0 or tokens.max() >= self.model.n_vocab:
            raise EngineFault("token id out of range", allowed=f"0 to {self.model.n_vocab - 1}")
        if slots.min() < 0 or slots.max() >= self.slots:
            raise EngineFault("slot out of range", allowed=f"0 to {self.slots - 1}")


def _check_config(config: EngineConfig, rows: int, n_batch: int, kv_type: KvType) -> None:
    if rows > n_batch:
        raise ConfigError(
            f"a batch of {n_batch} tokens does not hold one verify batch of all slots: {rows}",
            field="n_batch",
            got=n_batch,
            allowed=f">= {rows}",
        )
    if kv_type != "f16" and not config.flash_attention:
        raise ConfigError(
            f"KV type {kv_type} needs flash attention", field="kv_type", got=kv_type, allowed="f16"
        )
