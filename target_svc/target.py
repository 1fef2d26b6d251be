"""The target's state: engine, tokenizer, queue and pipeline, from start to end.

One `Target` a process, built by `__main__`, called by `service.py`. It starts the engine, measures
the prefill rate, and says at each moment whether requests can be served. Refuses work while the
model loads, and when it holds as many prompts as it may; a restart of the engine refuses nothing,
for requests wait it out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kernels.errors import KernelError
from kernels.ipc.physical import Physical, Transport, open_physical
from modelfile.chat_template import ChatTemplate
from modelfile.gguf_file import GgufFile
from modelfile.hparams import ModelShape
from modelfile.stream_decoder import StreamDecoder
from modelfile.tokenizer import Tokenizer
from skim.errors import Busy, PreconditionFailed, SkimError, Unavailable
from skim.log import get_logger
from skim.spans import Span
from target_svc.admission import Admission
from target_svc.answer import Decoder
from target_svc.config import TargetSettings
from target_svc.engine_client import EngineClient
from target_svc.memory.full_context import FullContextBudget, available_host_bytes
from target_svc.memory.gpu_memory import from_kernel_error
from target_svc.memory.landlord import Landlord
from target_svc.messages import Load, Ready
from target_svc.pipeline import Pipeline
from target_svc.prefill_rate import PrefillRate
from target_svc.tokenise import PromptTokeniser

log = get_logger()

# Length for which the one published rate is stated: where skimming starts to pay.
RATE_TOKENS = 8_192


class TargetModel:
    """What the model's file says without being run.

    Raises:
        ModelFileError: the file is missing, cut short or corrupt, its vocabulary is unknown to us,
            or its chat template does not parse.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile.open(path)
        self.shape = ModelShape.from_gguf(self.file, any_architecture=True)
        self.tokenizer = Tokenizer.from_gguf(self.file)
        self.digest = self.file.model_digest
        self.chat_template = ChatTemplate.from_gguf(self.file, self.tokenizer)


class Target:
    """Everything one target process holds.

    Args:
        settings: of this process.
        model: the file that the engine will run.
        physical: the GPU whose memory is shared with drafters, where the settings ask for a memory
            plane; None: the first one that CUDA finds. Tests give one that needs no GPU, and
            contexts then ask it for their bytes wherever they lie.
    Raises:
        ConfigError: a memory plane is asked for, and there is no GPU.

    Attributes:
        landlord: of the drafters' weights; None: no memory plane.
        on_health: called with whether requests can be served, when that may have changed.
        on_failure: called once, when the engine failed for good.
    """

    def __init__(
        self, settings: TargetSettings, model: TargetModel, *, physical: Physical | None = None
    ) -> None:
        self.settings = settings
        self._physical: Physical | None = None
        self._pretend_gpu = physical is not None
        self.landlord: Landlord | None = None
        if (memory := settings.memory()) is not None:
            self._physical = physical or first_gpu(settings.memory_transport)
            self.landlord = Landlord(self._physical, memory)
        self.model = model
        self.engine = EngineClient(settings.engine())
        self.admission = Admission(
            settings.slots,
            queue_limit=settings.queue_limit,
            default_deadline_s=settings.default_deadline_s,
        )
        self.rate = PrefillRate()
        self.on_health: Callable[[bool], None] = lambda serving: None
        self.on_failure: Callable[[SkimError], None] = lambda error: None
        self._pool = ThreadPoolExecutor(settings.tokenise_threads, thread_name_prefix="target")
        self._pipeline: Pipeline | None = None
        self._streams = 0
        self._closing = False

    async def start(self) -> None:
        """Load the model, time prefills, then serve; drafters may attach while it loads.

        Raises:
            ConfigError: the memory plane's socket cannot be made, or another target has it.
            ModelFileError: llama.cpp cannot open the model.
            EngineFault: the engine died again and again, or there is no memory for its context.
        """
        if self.landlord is not None:
            await self.landlord.start()
            self.engine.on_load = self._load_changed
        self.engine.on_change = self._engine_changed
        await self.engine.start()
        facts = await self.engine.ready()
        in_landlord_memory = facts.gpu or self._pretend_gpu
        room_bytes = await self.landlord.largest_room() if self.landlord is not None else None
        pipeline = Pipeline(
            self.engine,
            facts,
            admission=self.admission,
            budget=full_context_budget(self.settings, facts, room_bytes),
            rate=self.rate,
            kept_max=self.settings.kept_max,
            kv_type=self.settings.kv_type,
            flush_s=self.settings.flush_s,
            room=self.landlord.room if self.landlord and in_landlord_memory else None,
        )
        if self.settings.calibration_s > 0.0:
            await pipeline.calibrate(self.settings.calibration_s)
        self._pipeline = pipeline
        log.info(
            "target_ready",
            model=self.settings.model_name,
            architecture=facts.architecture,
            load_s=round(facts.load_s + facts.warm_s, 3),
            full_max_tokens=pipeline.router.full_max_tokens,
            prefill_tokens_per_s=round(self.rate.tokens_per_s(self.settings.kept_max)),
        )
        self.on_health(self.serving)

    async def close(self) -> None:
        """Stop what runs and end the engine. Idempotent."""
        self._closing = True
        await self.engine.close()
        if self._pipeline is not None:
            await self._pipeline.idle()
        if self.landlord is not None and self._physical is not None:
            await self.landlord.close()
            self._physical.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def serving(self) -> bool:
        """Whether a request would be served at once, the queue apart."""
        return self._pipeline is not None and self.engine.facts is not None

    def require_pipeline(self) -> Pipeline:
        """Give the pipeline.

        Raises:
            Unavailable: reason MODEL_LOADING.
        """
        if self._pipeline is None:
            raise Unavailable("the model is loading", reason="MODEL_LOADING", retry_after_s=1.0)
        return self._pipeline

    @contextmanager
    def stream(self) -> Iterator[Pipeline]:
        """Count one Generate call, whose prompt we hold.

        Raises:
            Busy: too many are open.
            Unavailable: the model is loading.
        """
        pipeline = self.require_pipeline()
        limit = self.settings.streams_limit
        if self._streams >= limit:
            raise Busy(
                f"the target holds {limit} prompts already",
                got=self._streams,
                allowed=f"at most {limit}",
                retry_after_s=self.admission.hint_s("working"),
            )
        self._streams += 1
        try:
            yield pipeline
        finally:
            self._streams -= 1

    def tokeniser(self, control_ranges: tuple[Span, ...] = ()) -> PromptTokeniser:
        """Start on a prompt."""
        return PromptTokeniser(self.model.tokenizer, control_ranges, self._pool)

    def decoder(self) -> Decoder:
        """Start on an answer's text."""
        return StreamDecoder(self.model.tokenizer)

    async def render_chat(self, roles: list[str]) -> tuple[str, ...]:
        """Give the literal text before, between and after the contents of messages.

        Raises:
            PreconditionFailed: NO_CHAT_TEMPLATE, or TEMPLATE_NOT_STREAMABLE.
        """
        if self.model.chat_template is None:
            raise PreconditionFailed(
                f"{self.settings.model_name} has no chat template", reason="NO_CHAT_TEMPLATE"
            )
        render = self.model.chat_template.render_streamable
        return await asyncio.get_running_loop().run_in_executor(self._pool, render, roles)

    def _load_changed(self, load: Load) -> None:
        if self.landlord is not None:
            self.landlord.set_decoding(load.decoding > 0)

    def _engine_changed(self) -> None:
        self.on_health(self.serving)
        if self.engine.failure is not None and not self._closing:
            self.on_failure(self.engine.failure)


def first_gpu(transport: Transport) -> Physical:
    """The GPU that the engine runs on, as its memory's landlord opens it.

    Raises:
        ConfigError: there is none, or the CUDA packages are missing.
    """
    try:
        return open_physical(0, transport)
    except KernelError as error:
        raise from_kernel_error(error) from error


def full_context_budget(
    settings: TargetSettings, facts: Ready, room_bytes: int | None = None
) -> FullContextBudget:
    """Work the full context's limits out from the settings and what is free now.

    `room_bytes` is what the landlord could make free on the GPU; None: there is no landlord.
    """
    budget_bytes = settings.full_memory_bytes
    if budget_bytes is None:
        # The other half of a host's memory: page cache, other services.
        budget_bytes = room_bytes if facts.gpu else available_host_bytes() // 2
    # The working context's own buffers, as llama.cpp told them: its graph grows with each cell by
    # the mask, two bytes for every token of a batch, and the rest is the same in any context.
    per_cell = 2 * facts.n_batch if facts.scratch_bytes else 0
    graph_bytes = max(0, facts.scratch_bytes - facts.cells * per_cell)
    return FullContextBudget(
        kv_bytes_per_cell=facts.kv_bytes_per_cell,
        trained_tokens=facts.n_ctx_train,
        gen_max=settings.gen_max,
        budget_bytes=budget_bytes,
        setting_tokens=settings.full_max_tokens,
        buffer_bytes=facts.state_bytes_per_slot + graph_bytes,
        buffer_bytes_per_cell=per_cell,
    )
