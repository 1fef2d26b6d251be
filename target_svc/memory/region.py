"""One drafter's weights as the landlord keeps them: identity, residency, memory, image, tenant.

Changed by the landlord's parts in one event loop. `move` is the only way to another state, so that
everybody who watches sees each of them.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kernels.ipc.messages import Hello, Tensors
from kernels.ipc.physical import Physical, Region
from target_svc.memory.policy import RegionFacts
from target_svc.memory.residency import Residency, State

if TYPE_CHECKING:
    from target_svc.memory.lease import Lease

WATCH_LIMIT = 256  # states that a slow watcher may be behind; the oldest are dropped

Key = tuple[str, str]  # digests of the model and of its layout


@dataclass(frozen=True)
class RegionInfo:
    """What people and probes see of a region."""

    name: str
    generation: int
    state: State
    size_bytes: int
    model_digest: str
    layout_digest: str
    device_uuid: str
    lease_pid: int  # 0: nobody is attached
    transport: str
    copied_bytes: int
    layers_ready: int


class ManagedRegion:
    """One region.

    Attributes:
        residency: where its weights are.
        memory: our handle, while there is device memory.
        image_fd: the host's copy; -1 once closed.
        tensors: the table of its image; None until the image was written and checked.
        lease: who is attached, or is being attached.
        lock: held while memory is taken or given back, and while a tenant fills it.
        filling: its first tenant writes region and image.
        unmapped: set to the bytes of the tenant's workspace when it let go; None: nobody waits.
    """

    def __init__(self, hello: Hello, physical: Physical, clock: Callable[[], float]) -> None:
        self.name = hello.model
        self.key: Key = (hello.model_digest, hello.layout_digest)
        self.size_bytes = hello.size_bytes
        self._physical = physical
        self._clock = clock
        self.residency = Residency()
        self.since_s = clock()
        self.returned_s: float | None = None
        self.memory: Region | None = None
        self.image_fd = -1
        self.tensors: Tensors | None = None
        self.lease: Lease | None = None
        self.lock = asyncio.Lock()
        self.filling = False
        self.wanted = self.busy = self.kept_down = False
        self.workspace_bytes = 0
        self.copied_bytes = self.layers_ready = 0
        self.level_bytes = 0  # of the device, once a short park's bytes are back after all
        self.unmapped: asyncio.Future[int] | None = None
        self.tasks: dict[str, asyncio.Task[object]] = {}  # `park` and `unpark`, while they run
        self._watchers: set[_Watcher] = set()

    def move(self, residency: Residency) -> None:
        """Take a state, and tell whoever watches."""
        self.residency = residency
        self.since_s = self._clock()
        self.tell()

    def tell(self) -> None:
        """Tell whoever watches what holds now."""
        info = self.info()
        for watcher in self._watchers:
            watcher.push(info)

    def info(self) -> RegionInfo:
        """What people see."""
        return RegionInfo(
            self.name,
            self.residency.generation,
            self.residency.state,
            self.size_bytes,
            *self.key,
            self._physical.uuid,
            self.lease.pid if self.lease is not None else 0,
            self._physical.transport,
            self.copied_bytes,
            self.layers_ready,
        )

    def facts(self) -> RegionFacts:
        """What decisions need."""
        return RegionFacts(
            self.name,
            self.residency.state,
            self.size_bytes,
            leased=self.lease is not None,
            wanted=self.wanted,
            busy=self.busy,
            kept_down=self.kept_down,
            moving=self.lock.locked() or bool(self.tasks),
            since_s=self.since_s,
            returned_s=self.returned_s,
            workspace_bytes=self.workspace_bytes,
        )

    def facts_at_rest(self) -> RegionFacts:
        """The same, for whoever moves it and holds its lock."""
        return replace(self.facts(), moving=False)

    def let_go(self, workspace_bytes: int = 0) -> None:
        """Note that the tenant holds nothing of the region any more."""
        if self.unmapped is not None and not self.unmapped.done():
            self.unmapped.set_result(workspace_bytes)

    async def watch(self) -> AsyncGenerator[RegionInfo, None]:
        """What holds now, then each change, until the region is forgotten."""
        watcher = _Watcher()
        watcher.push(self.info())
        self._watchers.add(watcher)
        try:
            while (info := await watcher.next()) is not None:
                yield info
        finally:
            self._watchers.discard(watcher)

    def forget(self) -> None:
        """Close the image and end every watch; the memory was released before."""
        if self.image_fd >= 0:
            os.close(self.image_fd)
            self.image_fd = -1
        for watcher in self._watchers:
            watcher.push(None)


class _Watcher:
    """States that one reader has not seen yet; None ends them."""

    def __init__(self) -> None:
        self._pending: deque[RegionInfo | None] = deque(maxlen=WATCH_LIMIT)
        self._some = asyncio.Event()

    def push(self, info: RegionInfo | None) -> None:
        self._pending.append(info)
        self._some.set()

    async def next(self) -> RegionInfo | None:
        while not self._pending:
            self._some.clear()
            await self._some.wait()
        return self._pending.popleft()
