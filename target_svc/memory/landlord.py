"""The landlord of the drafters' weights: the doors for the target's service and for people.

It owns each drafter's region (device memory) and image (host memory); tenants attach over its unix
socket (`lease`), `keeper` moves regions off and on the device, `policy` decides. It needs no CUDA
context, lives in the service's event loop, and outlives every engine and every tenant.

`room` is what a full context asks for its bytes; `park`, `unpark` and `watch` are for people.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from kernels.ipc.physical import Physical
from skim.errors import DeadlineExceeded, NotFound, PreconditionFailed, Unavailable
from skim.log import get_logger
from target_svc.memory import policy
from target_svc.memory.gpu_memory import GpuMemory, no_room
from target_svc.memory.keeper import Keeper, ParkReport, Sleep
from target_svc.memory.lease import Lease
from target_svc.memory.listener import Listener
from target_svc.memory.policy import Enough, Hold, Impossible, Park, Wait
from target_svc.memory.region import ManagedRegion, RegionInfo
from target_svc.memory.settings import MemorySettings

log = get_logger()

MAX_LEASES = 64  # connections of tenants, attached or not


@dataclass(frozen=True)
class Room:
    """Bytes that were made free for a full context.

    Attributes:
        num_bytes: that are free for it.
        wait_s: from the request to the free bytes, the wait for others included.
        park_s: of it, parking.
        parked: names of the drafters that gave way.
    """

    num_bytes: int
    wait_s: float
    park_s: float
    parked: tuple[str, ...]


class Landlord:
    """One GPU's landlord. Call from one event loop only.

    Args:
        physical: the GPU; stays the caller's to close.
        settings: socket, policy and budget.
        clock: monotonic seconds.
        sleep: waits some seconds.
    """

    def __init__(
        self,
        physical: Physical,
        settings: MemorySettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._gpu = GpuMemory(physical, settings.budget_bytes)
        self._keeper = Keeper(self._gpu, settings, clock=clock, sleep=sleep)
        self._listener = Listener(settings.socket, settings.peer_uids, self._connected)
        self._leases: set[Lease] = set()
        self._rooms = asyncio.Lock()  # one full context at a time
        self._closed = False

    async def start(self) -> None:
        """Listen for tenants.

        Raises:
            ConfigError: the socket cannot be made, or another landlord has it.
        """
        self._listener.start()
        physical = self._gpu.physical
        log.info(
            "landlord_ready",
            socket=str(self._settings.socket),
            gpu=physical.name,
            gpu_uuid=physical.uuid,
            policy=self._settings.rules.policy,
            budget_bytes=self._gpu.budget_bytes,
            used_bytes=await self._gpu.used_bytes(),
        )

    async def close(self) -> None:
        """End all leases and give all memory back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._listener.close()
        for lease in list(self._leases):
            lease.revoke()
        await self._keeper.close()
        self._gpu.close()

    # For people and probes.

    def regions(self) -> tuple[RegionInfo, ...]:
        """All regions, by name."""
        found = (region.info() for region in self._keeper.regions.values())
        return tuple(sorted(found, key=lambda info: info.name))

    def watch(self, name: str) -> AsyncGenerator[RegionInfo, None]:
        """A region's states, the current one first, until the region is gone.

        Raises:
            NotFound: at once.
        """
        return self._keeper.named(name).watch()

    async def park(
        self, name: str, *, expect_generation: int = 0, timeout_s: float | None = None
    ) -> ParkReport:
        """Free a region's device memory; it stays parked until a tenant or a person wants it.

        Args:
            name: of the drafter.
            expect_generation: that the caller saw; 0: any.
            timeout_s: for the tenant to let go; then its lease is revoked. None: the setting.
        Raises:
            NotFound: no such drafter.
            PreconditionFailed: GENERATION_MISMATCH.
            Aborted: PARK_SHORT: fewer bytes came free than the region holds.
            DeadlineExceeded: it is being filled for the first time.
            EngineFault: the driver failed.
        """
        region = self._keeper.named(name)
        if region.residency.park_step(expect_generation) == "mismatch":
            raise _mismatch(region, expect_generation)
        region.kept_down = True
        limit_s = self._settings.park_timeout_s if timeout_s is None else timeout_s
        return await asyncio.shield(self._keeper.ensure_park(region, limit_s))

    async def unpark(
        self, name: str, *, expect_generation: int = 0
    ) -> AsyncGenerator[RegionInfo, None]:
        """Bring a region back; yields its progress, last of all the resident region.

        Raises:
            NotFound: no such drafter.
            PreconditionFailed: GENERATION_MISMATCH, or NO_TENANT: nobody is there to copy.
            Busy: NO_ROOM.
            Unavailable: UNPARK_INTERRUPTED: the tenant died, or the region was parked again.
        """
        region = self._keeper.named(name)
        step = region.residency.unpark_step(expect_generation)
        if step == "mismatch":
            raise _mismatch(region, expect_generation)
        region.kept_down = False
        if step != "done" and region.lease is None:
            raise PreconditionFailed(
                f"no drafter is attached to {name}: it comes back with the next that connects",
                reason="NO_TENANT",
            )
        region.busy = region.lease is not None  # policy `always`: until the next IDLE
        if step == "move":
            await asyncio.shield(self._keeper.ensure_unpark(region))
        async with aclosing(region.watch()) as infos:
            async for info in infos:
                yield info
                now = region.residency
                if now.state == "RESIDENT" and now.loaded:
                    if info.state == "RESIDENT":  # the last one: it has caught up
                        return
                elif now.state != "UNPARKING":
                    break
        raise Unavailable(
            f"the unpark of {name} was interrupted", reason="UNPARK_INTERRUPTED", retry_after_s=1.0
        )

    # For the target's service.

    @asynccontextmanager
    async def room(self, num_bytes: int, *, deadline_s: float | None = None) -> AsyncIterator[Room]:
        """Make bytes free for a full context, and keep them so while the body runs.

        Args:
            num_bytes: that the context takes at most.
            deadline_s: on the clock given at construction; None: no limit.
        Raises:
            Busy: NO_ROOM: they cannot be had; `limit_bytes` in the metadata can.
            DeadlineExceeded: they could not be had in time.
        """
        keeper, begin_s = self._keeper, self._clock()
        limit_s = None if deadline_s is None else max(0.0, deadline_s - begin_s)
        try:
            async with asyncio.timeout(limit_s):
                await self._turn()
                try:
                    room = await self._make_room(num_bytes, begin_s)
                except BaseException:
                    self._leave_room()
                    raise
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed while waiting for GPU memory") from None
        log.info("room", num_bytes=num_bytes, parked=room.parked, wait_s=round(room.wait_s, 5))
        try:
            yield room
        finally:
            self._leave_room()
            keeper.wake()

    async def largest_room(self) -> int:
        """Bytes that a full context could get if nobody else took any."""
        free = self._gpu.budget_bytes - await self._gpu.used_bytes()
        if self._settings.rules.policy != "never":
            free += self._keeper.regions_bytes()
        return max(0, free)

    def set_decoding(self, decoding: bool) -> None:
        """Say whether sequences decode; tenants are told when that changes."""
        if decoding == self._keeper.decoding:
            return
        self._keeper.decoding = decoding
        for lease in self._leases:
            lease.tell_decoding(decoding)

    async def _turn(self) -> None:
        self._keeper.rooms_waiting += 1
        try:
            await self._rooms.acquire()
        finally:
            self._keeper.rooms_waiting -= 1

    def _leave_room(self) -> None:
        """Let who waits for a Score come back first, then the next full context, then the rest."""
        self._keeper.hold = None
        for region in list(self._keeper.regions.values()):
            if policy.comes_back(self._settings.rules, region.facts(), rooms_waiting=True):
                self._keeper.ensure_unpark(region)
        self._rooms.release()
        self._keeper.touch()

    async def _make_room(self, num_bytes: int, begin_s: float) -> Room:
        keeper = self._keeper
        keeper.hold = Hold(num_bytes)
        parked: list[str] = []
        park_s = 0.0
        while not self._closed:
            used = await self._gpu.used_bytes()
            free = self._gpu.budget_bytes - used
            regions = [region.facts() for region in keeper.regions.values()]
            step = policy.room_step(
                self._settings.rules,
                regions,
                need_bytes=num_bytes,
                free_bytes=free,
                budget_bytes=self._gpu.budget_bytes,
                now_s=self._clock(),
            )
            match step:
                case Enough():
                    keeper.hold = Hold(num_bytes, used - keeper.regions_bytes())
                    return Room(num_bytes, self._clock() - begin_s, park_s, tuple(parked))
                case Impossible(limit_bytes):
                    raise no_room(num_bytes, limit_bytes)
                case Wait(until_s):
                    await keeper.changed(until_s)
                case Park(names):
                    park_begin_s = self._clock()
                    await self._park_all(names)
                    park_s += self._clock() - park_begin_s
                    parked += names
        raise Unavailable("the target is closing", reason="DRAINING")

    async def _park_all(self, names: tuple[str, ...]) -> None:
        """Park drafters for a full context; one that fails is logged, and counted with the rest."""
        timeout_s = self._settings.park_timeout_s
        tasks = []
        for name in names:
            try:
                tasks.append(self._keeper.ensure_park(self._keeper.named(name), timeout_s))
            except NotFound:
                continue
        if tasks:
            await asyncio.wait(tasks)  # does not cancel them, whoever cancels us

    def _connected(self, sock: socket.socket, pid: int, allowed: bool) -> None:
        lease = Lease(sock, pid, self._keeper)
        if not allowed:
            lease.turn_away("PEER_NOT_ALLOWED", "this user may not connect")
            return
        if len(self._leases) >= MAX_LEASES:
            lease.turn_away("REGION_BUSY", f"{MAX_LEASES} tenants are connected already")
            return
        self._leases.add(lease)
        task = self._keeper.spawn(lease.run())
        task.add_done_callback(lambda _: self._leases.discard(lease))


def _mismatch(region: ManagedRegion, expected: int) -> PreconditionFailed:
    return PreconditionFailed(
        f"{region.name} is at generation {region.residency.generation}, not {expected}",
        reason="GENERATION_MISMATCH",
        field="expect_generation",
        got=expected,
        allowed=region.residency.generation,
    )
