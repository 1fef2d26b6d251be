"""Moves regions off and on the device, and sees to it that each is where the policy wants it.

The landlord's core, below its doors (`landlord` for the service and for people, `lease` for the
tenants). All of it runs in one event loop; a region's lock orders what moves it. After every change
`touch` looks at all regions again, so nothing depends on who caused the change.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from kernels.ipc.messages import Hello, Quiesce
from kernels.ipc.messages import Region as RegionMessage
from skim.errors import Aborted, Busy, DeadlineExceeded, NotFound, SkimError
from skim.log import get_logger
from target_svc.memory import policy
from target_svc.memory.gpu_memory import GpuMemory
from target_svc.memory.policy import Hold
from target_svc.memory.region import Key, ManagedRegion, RegionInfo
from target_svc.memory.settings import MemorySettings

log = get_logger()

MAX_REGIONS = 16  # images on the host; the oldest that nobody holds gives way
Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class ParkReport:
    """A park that succeeded.

    Attributes:
        freed_bytes: of the region, measured; 0 when it was parked already.
        park_s: from the request to the counted bytes.
        workspace_bytes: what the tenant's own arena gave back besides.
    """

    info: RegionInfo
    freed_bytes: int
    already_parked: bool
    park_s: float
    workspace_bytes: int


class Keeper:
    """All regions of one GPU.

    Attributes:
        hold: what is promised to a full context.
        rooms_waiting: full contexts that wait for their turn.
        decoding: whether the target decodes.
    """

    def __init__(
        self,
        gpu: GpuMemory,
        settings: MemorySettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.gpu = gpu
        self.settings = settings
        self.rules = settings.rules
        self.clock = clock
        self.regions: dict[Key, ManagedRegion] = {}
        self.hold: Hold | None = None
        self.rooms_waiting = 0
        self.decoding = False
        self._sleep = sleep
        self._creating = asyncio.Lock()
        self._waiters: set[asyncio.Future[None]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._settling = False
        self._changes = 0
        self._closing = False

    # Who is there.

    def named(self, name: str) -> ManagedRegion:
        """The region of a drafter.

        Raises:
            NotFound: reason REGION_NOT_FOUND.
        """
        for region in self.regions.values():
            if region.name == name:
                return region
        names = ", ".join(sorted(region.name for region in self.regions.values()))
        raise NotFound(
            f"no drafter {name!r} has a region here",
            reason="REGION_NOT_FOUND",
            field="name",
            got=name,
            allowed=names or "nothing: no drafter has connected yet",
        )

    def add(self, hello: Hello) -> ManagedRegion | None:
        """Make room in the book for a new region; None: a tenant holds one of the same name."""
        key = (hello.model_digest, hello.layout_digest)
        for region in self._orphans():
            if region.name == hello.model or len(self.regions) >= MAX_REGIONS:
                self.forget(region)
        taken = any(region.name == hello.model for region in self.regions.values())
        if taken or len(self.regions) >= MAX_REGIONS:
            return None
        self.regions[key] = ManagedRegion(hello, self.gpu.physical, self.clock)
        return self.regions[key]

    def forget(self, region: ManagedRegion) -> None:
        """Drop a region and give its memory back."""
        self.regions.pop(region.key, None)
        region.forget()
        memory, region.memory = region.memory, None
        if memory is not None:
            self.spawn(self.gpu.discard(memory))

    def _orphans(self) -> Iterator[ManagedRegion]:
        for region in list(self.regions.values()):
            if region.lease is None and not region.facts().moving:
                yield region

    # Onto the device.

    async def give_memory(self, region: ManagedRegion) -> int:
        """Take device memory for a region and give a descriptor of it; hold its lock.

        Whoever no tenant holds gives way. Never cancel the task that awaits this.

        Raises:
            Busy: NO_ROOM.
            EngineFault: the driver failed.
        """
        async with self._creating:  # one at a time, or what others use would be counted wrong
            try:
                return await self._create(region)
            except Busy:
                if not await self._park_orphans():
                    raise
            return await self._create(region)

    async def _create(self, region: ManagedRegion) -> int:
        hold = self.hold
        ours = self.regions_bytes()

        def free_for_us(used: int) -> int:
            free = self.gpu.budget_bytes - used
            return policy.free_for_region(hold, free_bytes=free, others_bytes=used - ours)

        need = policy.region_need(region.facts(), hold)
        region.memory, fd = await self.gpu.create(region.size_bytes, need, free_for_us)
        return fd

    async def _park_orphans(self) -> bool:
        if self.rules.policy == "never":
            return False
        orphans = [r for r in self._orphans() if r.residency.state == "RESIDENT"]
        for region in orphans:
            with contextlib.suppress(SkimError):
                await self.ensure_park(region, self.settings.park_timeout_s)
        return bool(orphans)

    def regions_bytes(self) -> int:
        """Device memory of all regions."""
        return sum(r.size_bytes for r in self.regions.values() if r.memory is not None)

    def ensure_unpark(self, region: ManagedRegion) -> asyncio.Task[None]:
        """Bring a region back, or join whoever does."""
        return self._ensure(region, "unpark", lambda: self._bring_back(region))

    async def _bring_back(self, region: ManagedRegion) -> None:
        async with region.lock:
            lease = region.lease
            if region.residency.has_memory or lease is None or not lease.attached:
                return
            try:
                fd = await self.give_memory(region)
            except SkimError as error:
                if region.wanted and region.lease is lease:
                    lease.refuse_for_now("NO_ROOM", error.message)
                raise
            if region.lease is not lease or not lease.attached:
                os.close(fd)
                await self._give_back(region)
                return
            region.wanted = False
            region.copied_bytes = region.layers_ready = 0
            region.move(region.residency.unparking())
            message = RegionMessage(region.residency.generation, loaded=False, tensors=None)
            lease.send(message, [fd])

    # Off the device.

    def ensure_park(self, region: ManagedRegion, timeout_s: float) -> asyncio.Task[ParkReport]:
        """Park a region, or join whoever does."""
        return self._ensure(region, "park", lambda: self._send_away(region, timeout_s))

    async def _send_away(self, region: ManagedRegion, timeout_s: float) -> ParkReport:
        begin_s = self.clock()
        try:
            await asyncio.wait_for(region.lock.acquire(), timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{region.name} is being filled and cannot be parked yet", reason="REGION_FILLING"
            ) from None
        try:
            if self.regions.get(region.key) is not region:
                raise NotFound(f"{region.name} is gone", reason="REGION_NOT_FOUND")
            state = region.residency.state
            if state == "PARKED":
                return ParkReport(region.info(), 0, True, self.clock() - begin_s, 0)
            workspace = 0
            if state == "FAILED":
                freed = await self._recount(region)
            else:
                region.move(region.residency.parking())
                workspace = await self._quiesce(region, timeout_s)
                freed = await self._give_back(region)
                if freed >= region.size_bytes:
                    region.move(region.residency.parked())
                else:
                    region.move(region.residency.failed())
                    raise _short(region, freed)
        finally:
            region.lock.release()
        report = ParkReport(region.info(), freed, False, self.clock() - begin_s, workspace)
        log.info(
            "parked",
            region=region.name,
            generation=region.residency.generation,
            freed_bytes=freed,
            workspace_bytes=workspace,
            park_s=round(report.park_s, 5),
        )
        return report

    async def _quiesce(self, region: ManagedRegion, timeout_s: float) -> int:
        """Make the tenant let go; gives the bytes of its workspace, if it says so."""
        lease = region.lease
        if lease is None or not lease.attached:
            return 0
        region.unmapped = asyncio.get_running_loop().create_future()
        lease.send(Quiesce(region.residency.generation, timeout_s))
        try:
            region.workspace_bytes = await asyncio.wait_for(region.unmapped, timeout_s)
        except TimeoutError:
            log.warning("lease_revoked", region=region.name, pid=lease.pid, timeout_s=timeout_s)
            lease.revoke()
            return 0
        finally:
            region.unmapped = None
        return region.workspace_bytes

    async def _give_back(self, region: ManagedRegion) -> int:
        """Let the handle go; gives the bytes that came free, 0 where the driver failed."""
        assert region.memory is not None
        try:
            freed = await self.gpu.release(region.memory, region.size_bytes)
        except SkimError as error:
            log.error("region_release_failed", region=region.name, error=error.message)
            region.level_bytes = 0
            return 0
        finally:
            region.memory = None
        region.level_bytes = freed.level_bytes
        return freed.freed_bytes

    async def _recount(self, region: ManagedRegion) -> int:
        """Look whether the bytes of a short park are back."""
        over = await self.gpu.used_bytes() - region.level_bytes
        if over > 0:
            raise _short(region, region.size_bytes - over)
        region.move(region.residency.found_free())
        return region.size_bytes

    # What should happen next.

    def touch(self) -> None:
        """Something changed: wake whoever waits, and look at all regions once this step is over."""
        self._changes += 1
        self.wake()
        if not self._settling and not self._closing:
            self._settling = True
            asyncio.get_running_loop().call_soon(self._settle)

    def wake(self) -> None:
        """Let whoever waits look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self, until_s: float | None = None) -> None:
        """Wait until something changed, or until a time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        pause = None if until_s is None else asyncio.ensure_future(self._pause(until_s))
        try:
            waits = {waiter} if pause is None else {waiter, pause}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiters.discard(waiter)
            if pause is not None:
                pause.cancel()

    async def _pause(self, until_s: float) -> None:
        await self._sleep(max(0.0, until_s - self.clock()))

    def _settle(self) -> None:
        self._settling = False
        if self._closing:
            return
        for region in self.regions.values():
            facts = region.facts()
            if policy.goes_down(self.rules, facts):
                self.ensure_park(region, self.settings.park_timeout_s)
            elif policy.comes_back(self.rules, facts, rooms_waiting=self.rooms_waiting > 0):
                self.ensure_unpark(region)

    def _ensure(
        self, region: ManagedRegion, what: str, work: Callable[[], Coroutine[Any, Any, Any]]
    ) -> asyncio.Task[Any]:
        if what in region.tasks:
            return region.tasks[what]
        task = region.tasks[what] = self.spawn(work())
        seen = self._changes

        def ended(task: asyncio.Task[Any]) -> None:
            region.tasks.pop(what, None)
            refused = task.cancelled() or task.exception() is not None
            if what == "unpark" and refused and seen == self._changes:
                self.wake()  # nothing has changed: the next attempt would be refused too
            else:
                self.touch()

        task.add_done_callback(ended)
        return task

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something beside its caller, to its end."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SkimError):
            log.info("memory_step_refused", reason=error.reason, error=error.message)
        elif error is not None:
            log.error("memory_step_failed", exc_info=error)

    async def close(self) -> None:
        """Finish what runs, then give all memory back."""
        self._closing = True
        self.wake()
        while self._tasks:
            await asyncio.wait(self._tasks)
        for region in list(self.regions.values()):
            self.forget(region)
        while self._tasks:
            await asyncio.wait(self._tasks)


def _short(region: ManagedRegion, freed_bytes: int) -> Aborted:
    freed = max(0, freed_bytes)
    return Aborted(
        f"parking {region.name} freed {freed:,} of {region.size_bytes:,} bytes: another process "
        "still holds them",
        reason="PARK_SHORT",
        metadata={"freed": str(freed), "needed": str(region.size_bytes)},
    )
