"""Settings of the target's service process: prefix `SKIM_TARGET_`, table `[target]`.

Read once in `__main__`, printed once, passed down. Refuses unknown names and values out of range
before a socket is bound or a child is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from kernels.ipc.physical import Transport
from skim.config import ServiceSettings, settings_config
from target_svc.memory.policy import ParkPolicy, Rules
from target_svc.memory.settings import MemorySettings
from target_svc.messages import EngineConfig, KvType

# The engine's own bound on waiting requests: far above ours, so that ours answers first.
ENGINE_QUEUE_MARGIN = 8


class TargetSettings(ServiceSettings):
    """Settings of one target. Sizes in tokens or bytes, times in seconds, as the names say."""

    table: ClassVar[str] = "target"
    model_config = settings_config("SKIM_TARGET_")

    # Address of TargetService, health and reflection.
    listen: str = "127.0.0.1:50053"
    # Address of AdminService and MemoryService: loopback, since both can stop the service.
    admin_listen: str = "127.0.0.1:50063"
    # GGUF file.
    model: Path
    # Name that clients ask for; empty: the file's name without its ending.
    name: str = Field(default="", max_length=128)

    # Requests that decode at the same time, each with its share of the working context.
    slots: int = Field(default=1, ge=1, le=64)
    # Prompt tokens that a slot of the working context takes.
    kept_max: int = Field(default=16_384, ge=16, le=2_097_152)
    # Tokens generated for one request at most.
    gen_max: int = Field(default=2_048, ge=1, le=131_072)
    # Prompt tokens of the longest full prefill; unset: what `full_memory_bytes` holds, up to the
    # context the model was trained to; 0: no full context, only what fits the working one.
    full_max_tokens: int | None = Field(default=None, ge=0, le=2_097_152)
    # Memory for the KV cache of a full context; unset: on the CPU half of what is free at start,
    # on a GPU no bound of ours (the engine then refuses what does not fit).
    full_memory_bytes: int | None = Field(default=None, ge=0)
    # KV cache type. f16 is exact; q8_0 halves it, q4_0 quarters it.
    kv_type: KvType = "f16"
    # Tokens of a prefill chunk: 2,048 was the fastest on the CPU too (BENCHMARKS.md).
    batch: int = Field(default=2_048, ge=32, le=8_192)
    # CPU threads; 0: the cores this process may use.
    threads: int = Field(default=0, ge=0, le=512)
    # Longest stretch of a prefill that does not see a cancellation: deep in a prompt, chunks shrink
    # to keep it. 0: chunks never shrink, for benchmarks of the fastest prefill.
    deaf_max_s: float = Field(default=0.9, ge=0.0, le=60.0)
    # Layers on the GPU; -1: all, where the build has a GPU backend.
    gpu_layers: int = Field(default=-1, ge=-1, le=1_024)

    # Drafting, unless a request says otherwise. It never changes an answer.
    speculation: bool = True
    # Tokens drafted for each verify batch, 1 to 7.
    draft_tokens: int = Field(default=7, ge=1, le=7)

    # Requests that wait for a slot; one more is refused with RESOURCE_EXHAUSTED.
    queue_limit: int = Field(default=32, ge=0, le=4_096)
    # Generate calls open at once, uploading ones included: bounds the prompts held in memory.
    streams_limit: int = Field(default=128, ge=1, le=4_096)
    # Largest prompt. 2 Mi tokens of 4 bytes are 8 MiB.
    prompt_max_bytes: int = Field(default=8 << 20, ge=1, le=64 << 20)
    # A request without a deadline queues as if it had this one, so that it cannot starve.
    default_deadline_s: float = Field(default=600.0, gt=0.0, le=86_400.0)
    # How long a caller may leave us without its next message (config, part, end, plan).
    idle_timeout_s: float = Field(default=300.0, gt=0.0, le=86_400.0)

    # Unix socket for drafters that share the target's GPU, in a folder that only they can enter;
    # unset: no memory plane, each process keeps its own memory.
    memory_socket: Path | None = None
    # How that memory is shared. legacy_ipc, for drivers without vmm_fd, works inside one PID
    # namespace only and costs a CUDA context, about half a GiB of the GPU.
    memory_transport: Transport = "vmm_fd"
    # Whether drafters give their memory up for a full context (`auto`), are resident only while
    # they score (`always`), or are parked by people alone (`never`).
    park_policy: ParkPolicy = "auto"
    # Bytes of the GPU that everybody on it may use together; 0: all of it.
    gpu_memory_budget_bytes: int = Field(default=0, ge=0)
    # `auto` only: how long a drafter stays after it came back, so that mixed load does not thrash.
    min_resident_s: float = Field(default=2.0, ge=0.0, le=3_600.0)
    # How long a drafter may take to let go, its running pass included; then its lease is revoked.
    park_timeout_s: float = Field(default=5.0, gt=0.0, le=60.0)
    # Users whose drafters may connect, besides our own and root.
    memory_peer_uids: tuple[int, ...] = ()

    # Seconds at start spent on timing prefills, so that the first estimate is measured; 0: off.
    calibration_s: float = Field(default=2.0, ge=0.0, le=600.0)
    # Tokens of an answer are joined into one message for this long; the first is never held.
    flush_s: float = Field(default=0.02, ge=0.0, le=1.0)
    # Threads that tokenise.
    tokenise_threads: int = Field(default=2, ge=1, le=64)

    @property
    def model_name(self) -> str:
        """Name that clients ask for."""
        return self.name or self.model.stem

    def memory(self) -> MemorySettings | None:
        """What the landlord needs to know; None: there is none."""
        if self.memory_socket is None:
            return None
        return MemorySettings(
            socket=self.memory_socket,
            rules=Rules(self.park_policy, self.min_resident_s),
            budget_bytes=self.gpu_memory_budget_bytes,
            park_timeout_s=self.park_timeout_s,
            peer_uids=self.memory_peer_uids,
        )

    def engine(self) -> EngineConfig:
        """What the engine child needs to know."""
        return EngineConfig(
            model_path=str(self.model),
            slots=self.slots,
            kept_max=self.kept_max,
            gen_max=self.gen_max,
            kv_type=self.kv_type,
            n_batch=self.batch,
            threads=self.threads,
            gpu_layers=self.gpu_layers,
            deaf_max_s=self.deaf_max_s,
            max_waiting=self.slots + ENGINE_QUEUE_MARGIN,
        )
