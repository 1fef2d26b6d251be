"""A drafter on a GPU warms up before it is handed out, and gives way to a stop or to the CPU."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest

from drafter_svc import drafter as module
from drafter_svc.config import DrafterSettings
from drafter_svc.drafter import open_backend
from drafter_svc.host import DrafterHost
from skim.errors import Cancelled, EngineFault
from tests.fixtures.engine import tiny_model

WAIT_S = 30.0


class Gpu:
    """In the place of `CudaBackend`.

    Args:
        failure: what warming up ends in.
    """

    name = "cuda"

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure, self.closed = failure, False
        self.stops: list[object] = []

    def open(self, path: Path, *, planted: object) -> Gpu:
        return self

    def warm_up(self, stop: threading.Event) -> float:
        self.stops.append(stop)
        if self.failure is not None:
            raise self.failure
        return 0.25

    def close(self) -> None:
        self.closed = True


def settings(backend: str) -> DrafterSettings:
    return DrafterSettings(model=tiny_model(), backend=backend, threads=1)


def machine(monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> Gpu:
    gpu = Gpu(failure)
    monkeypatch.setattr(module, "examine_kernels", lambda: {"backend": "cuda", "reason": ""})
    monkeypatch.setattr(module, "CudaBackend", gpu)
    return gpu


def test_backend_is_warm_when_it_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, stop = machine(monkeypatch), threading.Event()
    backend, why_cpu, warm_up_s, _ = open_backend(tiny_model(), settings("cuda"), stop=stop)
    assert (backend, why_cpu, warm_up_s, gpu.stops) == (gpu, None, 0.25, [stop])
    assert not gpu.closed


def test_auto_takes_the_cpu_when_a_kernel_fails_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = machine(monkeypatch, EngineFault("block_score does not compile"))
    backend, why_cpu, *_ = open_backend(tiny_model(), settings("auto"))
    backend.close()
    assert (backend.name, why_cpu, gpu.closed) == ("cpu", "block_score does not compile", True)


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_stopped_warm_up_opens_nothing(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    gpu = machine(monkeypatch, Cancelled("the scoring pass was stopped"))
    with pytest.raises(Cancelled):
        open_backend(tiny_model(), settings(backend))
    assert gpu.closed


async def test_closing_the_host_stops_a_model_that_is_being_made_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def open_slowly(*arguments: object, stop: threading.Event, **options: Any) -> NoReturn:
        begun.set()
        if stop.wait(WAIT_S):
            stopped.set()
        raise Cancelled("the scoring pass was stopped")

    monkeypatch.setattr("drafter_svc.host.open_drafter", open_slowly)
    host = DrafterHost(settings("cpu"))
    loading = asyncio.create_task(host.start())
    assert await asyncio.to_thread(begun.wait, WAIT_S)
    loading.cancel()
    await host.close()
    assert await asyncio.to_thread(stopped.wait, WAIT_S)
