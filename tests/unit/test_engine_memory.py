"""What the engine asks of memory before llama.cpp takes it, and what it says when there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from skim.errors import Busy
from target_svc.llama import engine as module
from target_svc.llama.context import ContextBuffers
from target_svc.llama.engine import HOST_RESERVE_BYTES, Engine
from target_svc.messages import EngineConfig, Reserve

CELLS, BATCH, KV_BYTES = 1024, 512, 100
SCRATCH = 10 << 20


def engine(**facts: object) -> Engine:
    """An engine as far as its memory goes: no library, no model."""
    made = Engine.__new__(Engine)
    context = SimpleNamespace(
        cells=CELLS, n_batch=BATCH, buffers=ContextBuffers(CELLS * KV_BYTES, 0, SCRATCH)
    )
    made.__dict__ |= {
        "_config": EngineConfig("", slots=2, kept_max=100, gen_max=10),
        "_kv_bytes_per_cell": KV_BYTES,
        "_model": SimpleNamespace(gpu=False),
        "_working": SimpleNamespace(context=context),
        **facts,
    }
    return made


def refuse(*given: object) -> None:
    raise Busy("llama.cpp cannot create it: no memory", reason="CONTEXT_MEMORY")


def test_a_working_context_without_memory_names_the_settings_that_size_it() -> None:
    with pytest.raises(Busy, match="no memory; .* = 220 cells: lower one of them") as refused:
        engine(_lane=refuse)._working_lane()
    assert refused.value.reason == "CONTEXT_MEMORY"


def test_a_full_context_needs_its_cells_a_graph_and_the_reserve_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = 5 * CELLS
    needed = cells * KV_BYTES + SCRATCH + 4 * CELLS * 2 * BATCH + HOST_RESERVE_BYTES
    monkeypatch.setattr(module, "host_available_bytes", lambda: needed)
    engine()._require_memory(Reserve(cells, "f16"))
    monkeypatch.setattr(module, "host_available_bytes", lambda: needed - 1)
    with pytest.raises(Busy, match=f"needs {needed} bytes, {needed - 1} are free"):
        engine()._require_memory(Reserve(cells, "f16"))
