"""Say what a full context needs, what may be spent on it, and so the longest full prefill.

The service builds it from its settings and the engine's measured facts; the pipeline asks it before
it queues for a full context. Knows only arithmetic and the host's free bytes: the engine creates
contexts, and refuses for itself what turns out not to fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# What a first decode needs beyond creation: 40 MiB were measured, 128 MiB are set aside.
RESERVE_BYTES = 128 << 20
CELL_ALIGNMENT = 256  # llama.cpp rounds a context up to this many cells

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class FullContextBudget:
    """The budget of the one full context.

    Attributes:
        kv_bytes_per_cell: measured on the working context.
        trained_tokens: context that the model was trained to.
        gen_max: cells set aside for the answer.
        budget_bytes: most bytes to spend; None: no bound of ours.
        setting_tokens: the operator's own limit on the prompt; None: from the budget.
        buffer_bytes: that a context takes whatever its size, the reserve apart.
        buffer_bytes_per_cell: that a cell takes beyond its KV.
    """

    kv_bytes_per_cell: int
    trained_tokens: int
    gen_max: int
    budget_bytes: int | None
    setting_tokens: int | None = None
    buffer_bytes: int = 0
    buffer_bytes_per_cell: int = 0

    @property
    def max_tokens(self) -> int:
        """Prompt tokens of the longest full prefill that a full context can take; 0: none.

        Beyond the trained context a full prefill would be noise, so only the operator asks for it.
        """
        if self.setting_tokens is not None:
            return self.setting_tokens
        if self.budget_bytes is None:
            return self.trained_tokens
        return self.tokens_within(self.budget_bytes)

    def tokens_within(self, num_bytes: int) -> int:
        """Prompt tokens of the longest full prefill that so many bytes hold; 0: none."""
        free = num_bytes - RESERVE_BYTES - self.buffer_bytes
        cells = free // max(self._bytes_per_cell, 1) // CELL_ALIGNMENT * CELL_ALIGNMENT
        most = self.trained_tokens if self.setting_tokens is None else self.setting_tokens
        return max(0, min(most, cells - self.gen_max))

    def cells(self, prompt_tokens: int, answer_tokens: int) -> int:
        """KV cells of a context for a prompt and its answer."""
        need = prompt_tokens + answer_tokens
        return -(-need // CELL_ALIGNMENT) * CELL_ALIGNMENT

    def size_bytes(self, cells: int) -> int:
        """Bytes that a context of so many cells takes, reserve included."""
        return cells * self._bytes_per_cell + self.buffer_bytes + RESERVE_BYTES

    @property
    def _bytes_per_cell(self) -> int:
        return self.kv_bytes_per_cell + self.buffer_bytes_per_cell


def available_host_bytes() -> int:
    """Bytes that this process could still take: the machine's, or its control group's if fewer."""
    available = _field(Path("/proc/meminfo"), "MemAvailable:") * 1024
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        # Pages of files (the mapped model among them) count as used there, yet give way.
        used -= _field(_CGROUP / "memory.stat", "inactive_file")
    except OSError:
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def _field(table: Path, name: str) -> int:
    """Read one number of a table of names and numbers; 0 when it is not there."""
    for line in table.read_text(encoding="ascii").splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0
