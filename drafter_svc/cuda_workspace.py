"""How much device memory a pass takes beyond the weights, planned before anything is allocated.

One arena holds everything that lives during a pass; `plan_pass` cuts it into named sections from
the model's shape and the pass's sizes alone, so that what a length needs is known (and printed)
without a GPU. The arena is kept between passes, replaced by a larger one when a pass needs it, and
by a smaller one when `SHRINK_AFTER` passes in a row have needed less than half of it. Refuses
nothing: an arena that does not fit is `kernels.errors.OutOfMemory`, raised where it is allocated.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kernels.device import Device, Memory
from kernels.ops.attention_sm90 import SCRATCH_BYTES
from kernels.ops.tail_score import scratch_bytes
from modelfile.hparams import ModelShape

BLOCK_TOKENS = 128  # the kernels' tile, fixed when they are compiled
ALIGNMENT_BYTES = 256  # what an allocation has; 16 is the most that a kernel asks for
# Rows of the residual that are normalised, projected or fed forward at once. 16,384 rows fill the
# chip many times over with one product, and the feed-forward's activations stay at 0.3 GiB.
CHUNK_ROWS = 16_384
SHRINK_AFTER = 8  # passes: prompts that are long now and then do not allocate in each turn


@dataclass(frozen=True)
class PassSize:
    """What the size of a pass depends on, the model aside.

    Attributes:
        num_rows: tokens that run, copied ones included.
        num_tokens: tokens of the prompt.
        num_queries: scoring queries.
        chunk_tokens: tokens per chunk of the answer.
        num_attending: layers whose attention runs: all before the last scored one.
        num_groups: layer groups of the coverage panel.
        sparse: blocks are scored and selected; False: every layer is dense.
        chunk_rows: see `CHUNK_ROWS`.
    """

    num_rows: int
    num_tokens: int
    num_queries: int
    chunk_tokens: int
    num_attending: int
    num_groups: int
    sparse: bool
    chunk_rows: int = CHUNK_ROWS

    @property
    def num_blocks(self) -> int:
        """Key blocks, and query tiles."""
        return -(-self.num_rows // BLOCK_TOKENS)

    def list_rows(self, num_heads: int) -> int:
        """Entries of a layer's counts: one a tile and head, then up to 16 bytes' alignment."""
        return -(-num_heads * self.num_blocks // 4) * 4

    @property
    def num_chunks(self) -> int:
        """Chunks of the prompt."""
        return -(-self.num_tokens // self.chunk_tokens)


@dataclass
class WorkspacePlan:
    """Named sections of the arena.

    Attributes:
        offsets: name to bytes from the arena's start; `sizes`: name to bytes.
        num_bytes: of the whole arena.
    """

    offsets: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, name: str, num_bytes: int) -> None:
        """Append a section."""
        self.offsets[name], self.sizes[name] = self.num_bytes, num_bytes
        self.num_bytes += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def lines(self) -> list[str]:
        """The sections of 1 MiB and more, and the sum, for people."""
        largest = sorted(self.sizes.items(), key=lambda item: -item[1])
        rows = [(name, size) for name, size in largest if size >= 1 << 20]
        return [f"{n:<14}{b / (1 << 20):10.1f} MiB" for n, b in [*rows, ("all", self.num_bytes)]]


def plan_pass(shape: ModelShape, size: PassSize) -> WorkspacePlan:
    """Cut the arena of one pass."""
    plan = WorkspacePlan()
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    rows, blocks = size.num_rows, size.num_blocks
    chunk = max(size.num_queries, min(rows, size.chunk_rows))
    plan.add("ids", 4 * rows)
    plan.add("x", 4 * rows * shape.embed)
    plan.add("qkv", 2 * rows * (heads + 2 * kv_heads) * head_dim)
    plan.add("turns", 8 * head_dim // 2)
    plan.add("normed", 2 * chunk * shape.embed)
    plan.add("gate_up", 2 * chunk * 2 * shape.ffn)
    if size.sparse:
        plan.add("k_mean", 2 * kv_heads * blocks * head_dim)
        plan.add("v_mean", 2 * kv_heads * blocks * head_dim)
        plan.add("mass", 4 * heads * blocks * blocks)
        plan.add("indices", 4 * heads * blocks * blocks)
        # One a layer, downloaded together when the pass is over.
        plan.add("counts", 4 * size.num_attending * size.list_rows(heads))
        plan.add("cut", size.num_attending * size.list_rows(heads))
    plan.add("attention_scratch", SCRATCH_BYTES)
    plan.add("positions", 4 * size.num_queries)
    plan.add("query_rows", 4 * size.num_queries)
    plan.add("queries", 2 * size.num_queries * heads * head_dim)  # of the last scored layer
    plan.add("running_max", 4 * size.num_queries * size.num_tokens)
    plan.add("panel", 4 * size.num_groups * size.num_queries * size.num_chunks)
    plan.add("chunk_scores", 4 * size.num_chunks)
    scratch = scratch_bytes(
        num_heads=heads, num_queries=size.num_queries, num_prompt=size.num_tokens
    )
    plan.add("tail_scratch", scratch)
    return plan


class Workspace:
    """The arena: one allocation, as large as the largest of the last passes.

    Attributes:
        plan: of the pass that it was prepared for last.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Memory | None = None
        self._needed: deque[int] = deque(maxlen=SHRINK_AFTER)  # bytes of the last passes
        self.plan = WorkspacePlan()

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._memory.num_bytes if self._memory else 0

    def prepare(self, plan: WorkspacePlan) -> None:
        """Make room for a pass; its sections are then at `at`. Contents are undefined.

        Raises:
            OutOfMemory: it does not fit; no arena is held then.
        """
        self._needed.append(plan.num_bytes)
        most = max(self._needed)  # what the arena was made for is among them at first
        shrinks = 2 * most < self.num_bytes
        if shrinks or self.num_bytes < plan.num_bytes:
            self.close()  # first: both at once might not fit
            self._memory = self._device.allocate(most if shrinks else plan.num_bytes)
        self.plan = plan

    def at(self, name: str) -> int:
        """Device address of a section of the plan."""
        if self._memory is None:
            raise RuntimeError("the workspace is not prepared")
        return self._memory.address + self.plan.offsets[name]

    def close(self) -> None:
        """Give the arena back; the next pass takes a new one. Idempotent."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
