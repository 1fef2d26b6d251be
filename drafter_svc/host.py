"""The drafter that is loaded, those that could be, and the queue before it.

One a process, made by `__main__`; the servicers ask it for everything. A swap finishes the running
pass, makes the other model ready and takes its place; requests that wait are scored by the new one.
Refuses work before a model is loaded and during a swap (Unavailable), and names that it was not
configured with (NotFound).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from drafter_svc.config import DrafterSettings
from drafter_svc.cuda_lists import Planter
from drafter_svc.drafter import Drafter, OpenDrafter, open_drafter
from drafter_svc.memory_plane import MemoryPlane
from drafter_svc.queue import PassQueue
from skim.errors import Busy, NotFound, SkimError, Unavailable
from skim.log import get_logger

log = get_logger()

T = TypeVar("T")

# A swap gives up when the landlord has no place for the new model within this.
PLACE_WITHIN_S = 30.0
RETRY_AFTER_S = 1.0  # a model of the usual size is read in about this time


class DrafterHost:
    """See the module.

    Args:
        settings: of this process.
        opener: reads a model; tests pass their own.
        planted: see `cuda_backend.CudaBackend`; benchmarks only.
        plane: gives weights on a GPU their memory; closed with the host. None: it is their own.
    """

    def __init__(
        self,
        settings: DrafterSettings,
        opener: OpenDrafter | None = None,
        *,
        planted: Planter | None = None,
        plane: MemoryPlane | None = None,
    ) -> None:
        self.settings = settings
        self.queue = PassQueue(
            limit=settings.queue_limit, default_deadline_s=settings.default_deadline_s
        )
        # Threads that wait for tokenisers, and the one that reads models.
        self.pool = ThreadPoolExecutor(settings.tokenise_threads, thread_name_prefix="prompt")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._closing = threading.Event()
        self._plane = plane
        self._open = opener or partial(
            open_drafter, settings=settings, planted=planted, stop=self._closing, plane=plane
        )
        self._catalogue = settings.catalogue()
        self._current: Drafter | None = None
        self.queue.on_idle = self._idle
        self._ready: dict[str, Drafter] = {}  # loaded ahead of a swap
        self._change = asyncio.Lock()
        self._swapping = False
        self._streams = 0
        # Told of every change of health: nothing is served before `start` and during a swap.
        self.on_serving: Callable[[bool], Awaitable[None]] = _nobody

    @property
    def loaded(self) -> Drafter:
        """The drafter that scores, also during a swap.

        Raises:
            Unavailable: none is loaded yet.
        """
        if self._current is None:
            raise Unavailable(
                "the drafter's model is loading",
                reason="MODEL_LOADING",
                retry_after_s=RETRY_AFTER_S,
            )
        return self._current

    def require(self, name: str) -> Drafter:
        """The drafter for a new request.

        Args:
            name: the one it asks for; empty: whichever is loaded.
        Raises:
            NotFound: another one is loaded.
            Unavailable: none is loaded, or a swap is going on.
        """
        drafter = self.loaded
        if self._swapping:
            raise Unavailable(
                "the drafter is swapping its model",
                reason="MODEL_SWAPPING",
                retry_after_s=RETRY_AFTER_S,
            )
        self.check_name(name)
        return drafter

    def check_name(self, name: str) -> None:
        """Refuse the name of another drafter than the one that is loaded (NotFound)."""
        if name and name != self.loaded.name:
            raise NotFound(
                f"this drafter runs {self.loaded.name!r}, not {name!r}",
                field="config.model",
                got=name,
                allowed=self.loaded.name,
            )

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count one open Score call.

        Raises:
            Busy: as many are open as may be.
        """
        limit = self.settings.streams_limit
        if self._streams >= limit:
            raise Busy(
                f"{limit} Score calls are open already",
                reason="STREAMS_LIMIT",
                metadata={"limit": str(limit), "got": str(self._streams + 1)},
                retry_after_s=RETRY_AFTER_S,
            )
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    async def start(self) -> None:
        """Load the first model; with a memory plane, wait for the landlord's answer.

        Raises:
            ModelFileError: it cannot be used.
            ConfigError: the configured backend is not there, or the landlord refuses us.
        """
        async with self._change:
            self._current = await self._read(next(iter(self._catalogue)), active=True)
            await self.on_serving(True)
            self._idle()

    async def load(self, name: str) -> Drafter:
        """Make a drafter ready beside the one that scores.

        Raises:
            NotFound: no such name.
            ModelFileError: its file cannot be used.
        """
        self._path(name)
        # Read to its end, whoever asked for it, or nobody would ever close it.
        return await asyncio.shield(self._load(name))

    async def _load(self, name: str) -> Drafter:
        async with self._change:
            if self.loaded.name == name:
                return self.loaded
            if name not in self._ready:
                self._ready[name] = await self._read(name)
            return self._ready[name]

    async def swap(self, name: str) -> tuple[str, float]:
        """Score with another drafter from now on; the old one's weights are released.

        In a memory plane the landlord keeps the old one's, and may know the new one's already.

        Returns:
            The name of the old one, and the seconds without service.
        Raises:
            NotFound: no such name.
            ModelFileError: its file cannot be used; the old drafter goes on.
            Unavailable, EngineFault: the landlord gives the new one no place; the old one goes on.
        """
        self._path(name)
        # Begun, it is finished, whoever asked for it: half a swap would leave no model a place.
        return await asyncio.shield(self._swap(name))

    async def _swap(self, name: str) -> tuple[str, float]:
        async with self._change:
            old = self.loaded
            if old.name == name:
                return name, 0.0
            begin_s = time.monotonic()
            self._swapping = True
            try:
                await self.on_serving(False)
                await self.queue.pause()
                new = self._ready.pop(name, None) or await self._read(name)
                await self._in_loader(_activate, new, old)
                self._current = new
                old.close()
            finally:
                self._swapping = False
                self.queue.resume()
                await self.on_serving(True)
                if not self.queue.running:
                    self._idle()
            swap_s = time.monotonic() - begin_s
        log.info("drafter_swapped", previous=old.name, model=name, swap_s=swap_s)
        return old.name, swap_s

    async def close(self) -> None:
        """Stop the running pass, and a model that is being made ready; release everything."""
        self._closing.set()
        await self.queue.close()
        if self._plane is not None:
            await asyncio.to_thread(self._plane.end_lease)
            # It may be waiting for the landlord with a model of the plane in its hands.
            await asyncio.to_thread(self._loader.shutdown, cancel_futures=True)
        for drafter in filter(None, (self._current, *self._ready.values())):
            drafter.close()
        self._ready.clear()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._loader.shutdown(wait=False, cancel_futures=True)
        if self._plane is not None:
            self._plane.close()

    def _idle(self) -> None:
        """No request runs or waits: a landlord may want to know."""
        if self._current is not None:
            self._current.idle()

    def _path(self, name: str) -> Path:
        path = self._catalogue.get(name)
        if path is None:
            allowed = ", ".join(self._catalogue)
            raise NotFound(
                f"no drafter is named {name!r}; there are: {allowed}",
                field="name",
                got=name,
                allowed=allowed,
            )
        return path

    async def _in_loader(self, work: Callable[..., T], *arguments: Any) -> T:
        if self._closing.is_set():
            raise Unavailable("the drafter is closing", reason="DRAINING")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader, work, *arguments)

    async def _read(self, name: str, *, active: bool = False) -> Drafter:
        begin_s = time.monotonic()

        def read(path: Path) -> Drafter:
            drafter = self._open(name, path)
            if active:
                _activate(drafter)
            return drafter

        drafter = await self._in_loader(read, self._path(name))
        log.info(
            "drafter_loaded",
            model=name,
            model_digest=drafter.model_digest,
            backend=drafter.backend.name,
            why_cpu=drafter.why_cpu,
            load_s=time.monotonic() - begin_s,
            warm_up_s=drafter.warm_up_s,
        )
        return drafter


def _activate(new: Drafter, old: Drafter | None = None) -> None:
    """Give a drafter its place; where that fails, the one before gets its own again."""
    try:
        new.activate(None if old is None else PLACE_WITHIN_S)
    except BaseException:
        new.close()
        if old is not None:
            with contextlib.suppress(SkimError):  # its requests wait for the landlord, or are told
                old.activate(PLACE_WITHIN_S)
        raise


async def _nobody(serving: bool) -> None:
    """Before anybody listens."""
