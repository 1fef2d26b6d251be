"""The GPU's bytes, as the landlord's event loop sees them: taken, exported, given back, counted.

Every call to the driver and to NVML runs in one worker thread, one after the other: what was asked
for later sees what was done before. The one place of this service where an error of `kernels`
becomes one of ours. Knows no tenant and no policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from kernels import errors as kernel_errors
from kernels.errors import KernelError
from kernels.ipc.physical import Physical, Region
from skim.errors import Busy, ConfigError, EngineFault, SkimError

T = TypeVar("T")

# Bytes that are not back at once get another 100 ms before a park is called short: those of an
# idle tenant always were at once, but a driver needs some 70 ms to clear up after a killed process.
RECOUNTS, RECOUNT_WAIT_S = 20, 0.005


@dataclass(frozen=True)
class Freed:
    """What a release gave back: `freed_bytes` measured, `level_bytes` that are used if all came."""

    freed_bytes: int
    level_bytes: int


class GpuMemory:
    """One GPU's memory and how much of it may be used.

    Args:
        physical: the GPU; stays the caller's to close.
        budget_bytes: of the device, for everybody on it; 0: all of it.
    """

    def __init__(self, physical: Physical, budget_bytes: int = 0) -> None:
        self.physical = physical
        total = physical.total_bytes
        self.budget_bytes = min(budget_bytes, total) if budget_bytes else total
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="landlord")

    async def used_bytes(self) -> int:
        """Bytes of the device that any process holds now."""
        return await self._run(self.physical.used_bytes)

    async def create(
        self, size_bytes: int, need_bytes: int, free_for_us: Callable[[int], int]
    ) -> tuple[Region, int]:
        """Take a region; gives it and a descriptor of it for its tenant.

        Args:
            size_bytes: of the region.
            need_bytes: that must be free for it, its tenant's workspace included.
            free_for_us: how much of the device we may take, given the bytes used. Runs in the
                worker thread.
        Raises:
            Busy: NO_ROOM.
            EngineFault: the driver failed.
        """

        def work() -> tuple[Region, int]:
            free = free_for_us(self.physical.used_bytes())
            if need_bytes > free:
                raise no_room(need_bytes, free)
            region = self.physical.create(size_bytes)
            try:
                return region, region.export()
            except BaseException:
                region.close()
                raise

        return await self._run(work)

    async def export(self, region: Region) -> int:
        """A descriptor of a region, for its tenant."""
        return await self._run(region.export)

    async def release(self, region: Region, size_bytes: int) -> Freed:
        """Let our handle go, and measure what came free.

        Raises:
            EngineFault: the driver failed; whether bytes came free is not known.
        """

        def work() -> tuple[int, int]:
            try:
                before = self.physical.used_bytes()
            finally:  # bytes that cannot be counted must come free all the same
                region.close()
            return before, self.physical.used_bytes()

        before, after = await self._run(work)
        for _ in range(RECOUNTS):
            if before - after >= size_bytes:
                break
            await asyncio.sleep(RECOUNT_WAIT_S)
            after = await self.used_bytes()
        return Freed(max(0, before - after), before - size_bytes)

    def discard(self, region: Region) -> Coroutine[Any, Any, None]:
        """Let our handle go, before whatever is asked for after this call; await it for errors."""
        done = asyncio.get_running_loop().run_in_executor(self._worker, region.close)

        async def wait() -> None:
            try:
                await done
            except KernelError as error:
                raise from_kernel_error(error) from error

        return wait()

    def close(self) -> None:
        """Wait for the call that runs, and end the worker."""
        self._worker.shutdown(wait=True)

    async def _run(self, call: Callable[[], T]) -> T:
        # Shielded by nature: the call ends in its thread whatever happens to who waits for it; so
        # callers of `create` are tasks that nobody cancels, or a region would be lost.
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, call)
        except KernelError as error:
            raise from_kernel_error(error) from error


def no_room(need_bytes: int, free_bytes: int) -> Busy:
    """Say that bytes cannot be had now."""
    free = max(0, free_bytes)
    return Busy(
        f"{need_bytes:,} bytes of GPU memory are needed, {free:,} can be had",
        reason="NO_ROOM",
        metadata={"limit_bytes": str(free), "got_bytes": str(need_bytes)},
    )


def from_kernel_error(error: KernelError) -> SkimError:
    """Map the kernels' small tree onto ours."""
    match error:
        case kernel_errors.OutOfMemory():
            return Busy(str(error), reason="NO_ROOM")
        case kernel_errors.NoDevice():
            return ConfigError(f"there is no GPU for the memory plane: {error}")
        case _:
            return EngineFault(str(error))
