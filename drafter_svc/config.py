"""Settings of the drafter: prefix `SKIM_DRAFTER_`, table `[drafter]`.

Read once in `__main__`, printed once, passed down. Refuses unknown names, values out of range and
model lists that name one twice, before a socket is bound or a model is read. What a request leaves
unset it takes from here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from drafter_svc.backend import AttentionConfig
from drafter_svc.selection import SelectionConfig
from skim.config import ServiceSettings, settings_config

BackendName = Literal["auto", "cpu", "cuda"]
ScorerName = Literal["specprefill", "mid_layer", "lexical", "ends", "random"]
NAMED_MODEL = re.compile(r"([A-Za-z0-9._-]{1,64})=(\S.*)")


class DrafterSettings(ServiceSettings):
    """Settings of one drafter. Sizes in tokens or bytes, times in seconds, as the names say."""

    table: ClassVar[str] = "drafter"
    model_config = settings_config("SKIM_DRAFTER_")

    # Address of DrafterService, health and reflection.
    listen: str = "127.0.0.1:50052"
    # Address of AdminService: loopback, since it can stop the service and swap its model.
    admin_listen: str = "127.0.0.1:50062"
    # GGUF file of the drafter that is loaded at start; unset: the first of `models`.
    model: Path | None = None
    # Name of that drafter; empty: the file's name without its ending.
    name: str = Field(default="", pattern=r"^[A-Za-z0-9._-]{0,64}$")
    # Drafters to swap to, as `name=path`, separated by commas.
    models: str = ""
    # Where the pass runs. auto: the GPU where one can be used, else the CPU.
    backend: BackendName = "auto"
    # CPU threads of a pass; 0: the cores this process may use.
    threads: int = Field(default=0, ge=0, le=512)
    # Most that look-ahead's keys and values may take.
    workspace_bytes: int = Field(default=2 << 30, ge=0)

    # Unix socket of the landlord that gives the weights GPU memory (a target's memory_socket).
    # Unset: they are this process's own.
    memory_socket: Path | None = None
    # While the target decodes on the same GPU, a pass does at least so much work, then pauses so
    # long, in milliseconds: without pauses decode steps take 3.65 times as long. Pause 0: none.
    pace_work_ms: float = Field(default=14.0, ge=0.0, le=1_000.0)
    pace_pause_ms: float = Field(default=15.0, ge=0.0, le=1_000.0)

    # Requests that wait for the pass; one more is refused with RESOURCE_EXHAUSTED.
    queue_limit: int = Field(default=8, ge=0, le=4_096)
    # Score calls open at once, uploading ones included: bounds the prompts held in memory.
    streams_limit: int = Field(default=64, ge=1, le=4_096)
    # Largest prompt, in bytes and in the drafter's tokens.
    prompt_max_bytes: int = Field(default=64 << 20, ge=1, le=(1 << 32) - 1)
    prompt_max_tokens: int = Field(default=262_144, ge=1, le=1 << 24)
    # A request without a deadline queues as if it had this one, so that it cannot starve.
    default_deadline_s: float = Field(default=600.0, gt=0.0, le=86_400.0)
    # How long a caller may leave us without its next message (config, part, end).
    idle_timeout_s: float = Field(default=120.0, gt=0.0, le=86_400.0)

    # Fraction of the prompt's tokens that is kept.
    keep_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    # Least and largest fraction kept when a request asks for a coverage.
    min_keep: float = Field(default=0.02, gt=0.0, le=1.0)
    max_keep: float = Field(default=0.3, gt=0.0, le=1.0)
    # Chunks of 32 tokens that are always kept at the prompt's start and end.
    head_chunks: int = Field(default=1, ge=0, le=1_024)
    tail_chunks: int = Field(default=4, ge=0, le=1_024)
    # Chunks that each pick brings on both sides, inside the budget.
    neighbour_chunks: int = Field(default=1, ge=0, le=64)

    # How chunks are scored.
    scorer: ScorerName = "specprefill"
    # Width in tokens of the average pool over a row of scores, odd.
    pool_kernel: int = Field(default=13, ge=1, le=1_023)
    # Whether the prompt's last token asks, beside those of the query.
    last_token_query: bool = True

    # Block-sparse attention: a block stays if its mass is at least alpha x the row's largest.
    alpha: float = Field(default=0.1, ge=0.0, le=1.0)
    # Largest fraction of causal blocks a row keeps; 1: no bound.
    max_density: float = Field(default=0.25, gt=0.0, le=1.0)
    # First blocks, blocks before the diagonal, and last query tiles that are never pruned.
    sink_blocks: int = Field(default=2, ge=0, le=1_024)
    window_blocks: int = Field(default=4, ge=1, le=1_024)
    last_full_blocks: int = Field(default=2, ge=0, le=1_024)
    # Shorter prompts get every block: pruning would cost more than it saves.
    dense_below_tokens: int = Field(default=8_192, ge=0)

    # Threads that wait for the rest of a prompt's tokens.
    tokenise_threads: int = Field(default=2, ge=1, le=64)

    @field_validator("pool_kernel")
    @classmethod
    def _pool_is_centred(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd")
        return value

    @field_validator("models")
    @classmethod
    def _models_are_named_once(cls, value: str, info: ValidationInfo) -> str:
        if "model" in info.data and "name" in info.data:
            _catalogue(info.data["model"], info.data["name"], value)
        return value

    @field_validator("max_keep")
    @classmethod
    def _bounds_are_in_order(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("min_keep", 0.0):
            raise ValueError(f"must be at least min_keep, {info.data['min_keep']}")
        return value

    def catalogue(self) -> dict[str, Path]:
        """Every drafter this service may load, by name; the one loaded at start comes first."""
        return _catalogue(self.model, self.name, self.models)

    def selection(self) -> SelectionConfig:
        """The selection of a request that asks for nothing else."""
        return SelectionConfig(
            keep_ratio=self.keep_ratio,
            min_keep=self.min_keep,
            max_keep=self.max_keep,
            head_chunks=self.head_chunks,
            tail_chunks=self.tail_chunks,
            neighbour_chunks=self.neighbour_chunks,
        )

    def attention(self) -> AttentionConfig:
        """The attention of a request that asks for nothing else."""
        return AttentionConfig(
            alpha=self.alpha,
            max_density=self.max_density,
            sink_blocks=self.sink_blocks,
            window_blocks=self.window_blocks,
            last_full_blocks=self.last_full_blocks,
            dense_below_tokens=self.dense_below_tokens,
        )


def _catalogue(model: Path | None, name: str, models: str) -> dict[str, Path]:
    pairs = [(name or model.stem, model)] if model else []
    for item in filter(None, (item.strip() for item in models.split(","))):
        match = NAMED_MODEL.fullmatch(item)
        if match is None:
            raise ValueError(f"{item!r} is not name=path")
        pairs.append((match[1], Path(match[2])))
    if not pairs:
        raise ValueError("model or models must name a GGUF file")
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a drafter is named twice")
    return found
