"""One tenant's connection, which is its lease: reads its messages and answers them.

Made by the landlord for each connection, ended by the end of the connection, whoever ends it. What
a tenant does out of turn or out of range is answered by REFUSED and the end of its lease; the
region stays, for its successor. Refuses tenants on another GPU, and a second tenant of a region.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence

from kernels.errors import KernelError, PeerGone, ProtocolError
from kernels.ipc import image, messages
from kernels.ipc.channel import AsyncChannel, close_fds
from kernels.ipc.messages import (
    PROTOCOL,
    Copied,
    Fill,
    Filled,
    Hello,
    Idle,
    Message,
    Parked,
    Ready,
    Reason,
    Refused,
    State,
    Unmapped,
    Want,
)
from skim.errors import SkimError
from skim.log import get_logger
from target_svc.memory import policy
from target_svc.memory.gpu_memory import from_kernel_error
from target_svc.memory.keeper import Keeper
from target_svc.memory.region import ManagedRegion

log = get_logger()

RETRY_AFTER_S = 1.0  # what is refused for now is given unasked as soon as it can be
BUSY_RETRY_S = 0.25  # a predecessor that died is noticed within 33 ms
FILL_TIMEOUT_S = 300.0  # a tenant that writes its image for longer hangs


class Refusal(Exception):
    """What ends a lease by REFUSED."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class Lease:
    """One connection of a tenant.

    Attributes:
        pid: of the tenant, as the kernel names it.
        region: what it is attached to, or is being attached to.
        attached: it was sent the answer to its HELLO, so it knows its generation.
    """

    def __init__(self, sock: socket.socket, pid: int, keeper: Keeper) -> None:
        self.pid = pid
        self.region: ManagedRegion | None = None
        self.attached = False
        self._keeper = keeper
        self._channel = AsyncChannel(sock)
        self._fill_timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Serve the tenant until its connection ends."""
        try:
            while True:
                message, fds = await self._channel.receive()
                close_fds(fds)  # no tenant has any to give
                await self._take(message)
                self._keeper.touch()
                await asyncio.sleep(0)  # others get their turn, however much a tenant sends
        except PeerGone as gone:
            log.info("tenant_gone", pid=self.pid, why=str(gone))
        except ProtocolError as error:
            self._refuse_for_good("BAD_MESSAGE", str(error))
        except Refusal as refusal:
            self._refuse_for_good(refusal.reason, str(refusal))
        except (KernelError, OSError) as error:
            log.error("lease_failed", pid=self.pid, error=str(error))
        finally:
            self._channel.close()
            self._gone()
            self._keeper.touch()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Tell the tenant something; `fds` are closed in every case."""
        self._channel.send(message, fds)

    def refuse_for_now(self, reason: Reason, message: str, retry_after_s: float | None = 0) -> None:
        """Say no; the lease stays."""
        self.send(Refused(reason, message, RETRY_AFTER_S if retry_after_s == 0 else retry_after_s))

    def turn_away(self, reason: Reason, message: str) -> None:
        """End a lease that never began."""
        self._refuse_for_good(reason, message)
        self._channel.close()

    def revoke(self) -> None:
        """End the lease now: whatever the tenant still holds, we count without it."""
        self._channel.close()
        self._gone()

    def tell_decoding(self, decoding: bool) -> None:
        """Tell an attached tenant whether the target decodes."""
        if self.attached:
            self.send(State(decoding))

    def _refuse_for_good(self, reason: Reason, message: str) -> None:
        log.warning("lease_refused", pid=self.pid, reason=reason, error=message)
        self.send(Refused(reason, message[: messages.MAX_SENTENCE], None))

    async def _take(self, message: Message) -> None:
        region = self.region
        if isinstance(message, Hello):
            await self._hello(message)
            return
        if region is None or not self.attached:
            raise Refusal("BAD_MESSAGE", f"{type(message).__name__.upper()} before HELLO")
        match message:
            case Want():
                region.wanted = region.busy = True
            case Idle():
                region.wanted = region.busy = False
            case Copied():
                if self._is_current(region, message.generation):
                    self._copied(region, message)
            case Unmapped():
                if self._is_current(region, message.generation):
                    if region.unmapped is None:
                        raise Refusal("BAD_MESSAGE", "UNMAPPED without QUIESCE")
                    region.let_go(message.workspace_bytes)
            case Filled():
                if self._is_current(region, message.generation):
                    await self._filled(region, message)
            case _:
                raise Refusal("BAD_MESSAGE", f"{type(message).__name__.upper()} is not a tenant's")

    def _is_current(self, region: ManagedRegion, generation: int) -> bool:
        """Whether a message speaks of now; one of the past is ignored.

        Raises:
            Refusal: it speaks of a generation that was never given.
        """
        age = region.residency.age(generation)
        if age == "newer":
            raise Refusal(
                "BAD_MESSAGE",
                f"generation must be {region.residency.generation} at most, got {generation}",
            )
        if age == "older":
            log.info("message_of_the_past", region=region.name, generation=generation)
        return age == "now"

    # HELLO

    async def _hello(self, hello: Hello) -> None:
        self._check_hello(hello)
        key = (hello.model_digest, hello.layout_digest)
        await self._leave(key)
        region = self._keeper.regions.get(key)
        if region is not None and region.lease is not None:
            pid = region.lease.pid
            message = f"{region.name} is leased to process {pid}"
            self.refuse_for_now("REGION_BUSY", message, BUSY_RETRY_S)
            return
        if region is not None and region.size_bytes != hello.size_bytes:
            sizes = f"{region.size_bytes:,}, got {hello.size_bytes:,}"
            raise Refusal("BAD_MESSAGE", f"size_bytes of this layout must be {sizes}")
        region = region or self._keeper.add(hello)
        if region is None:
            message = f"another region is called {hello.model}, or there are too many"
            self.refuse_for_now("REGION_BUSY", message, BUSY_RETRY_S)
            return
        region.lease, self.region = self, region
        await region.lock.acquire()
        try:
            await (self._fill(region) if region.tensors is None else self._attach(region))
        except SkimError as error:
            self.region, region.lease = None, None
            if region.tensors is None:
                self._keeper.forget(region)
            self.refuse_for_now("NO_ROOM", error.message)
        finally:
            if not region.filling:
                region.lock.release()
        if self.attached and self._keeper.decoding:
            self.send(State(True))

    def _check_hello(self, hello: Hello) -> None:
        physical = self._keeper.gpu.physical
        if hello.protocol != PROTOCOL:
            raise Refusal("BAD_MESSAGE", f"protocol must be {PROTOCOL}, got {hello.protocol}")
        if hello.gpu_uuid != physical.uuid:
            raise Refusal(
                "GPU_MISMATCH", f"the target is on GPU {physical.uuid}, got {hello.gpu_uuid}"
            )
        unit = physical.granularity_bytes
        if not hello.size_bytes or hello.size_bytes % unit:
            raise Refusal(
                "BAD_MESSAGE", f"size_bytes must be a multiple of {unit}, got {hello.size_bytes}"
            )
        budget = self._keeper.gpu.budget_bytes
        if hello.size_bytes > budget:
            sizes = f"{hello.size_bytes:,} bytes exceed the budget of {budget:,}"
            raise Refusal("NO_ROOM", sizes)

    async def _leave(self, new_key: tuple[str, str]) -> None:
        """Let the region go that this tenant had: it has unmapped it before it said HELLO again."""
        region = self.region
        if region is None:
            return
        self._gone()
        if region.key != new_key and region.residency.state in ("RESIDENT", "PARKING"):
            timeout_s = self._keeper.settings.park_timeout_s
            await asyncio.wait([self._keeper.ensure_park(region, timeout_s)])

    async def _attach(self, region: ManagedRegion) -> None:
        assert region.tensors is not None
        keeper = self._keeper
        fd = await self._region_fd(region)
        if fd is None:
            message: Message = Parked(region.residency.generation, region.tensors)
            self.send(message, [os.dup(region.image_fd)])
        else:
            residency = region.residency
            message = messages.Region(residency.generation, residency.loaded, region.tensors)
            self.send(message, _with_image(fd, region))
        self.attached = True
        log.info("attached", region=region.name, pid=self.pid, state=region.residency.state)
        keeper.touch()

    async def _region_fd(self, region: ManagedRegion) -> int | None:
        """A descriptor of the region's memory, brought back if the policy wants it; None: parked.

        Raises:
            EngineFault: the driver failed.
        """
        if region.memory is not None:
            fd = await self._keeper.gpu.export(region.memory)
            if not region.residency.loaded:
                self._begin_copy(region)
            return fd
        waiting = self._keeper.rooms_waiting > 0
        facts = region.facts_at_rest()
        if not policy.comes_back(self._keeper.rules, facts, rooms_waiting=waiting):
            return None
        try:
            fd = await self._keeper.give_memory(region)
        except SkimError as error:
            log.info("stays_parked", region=region.name, error=error.message)
            return None
        self._begin_copy(region)
        return fd

    def _begin_copy(self, region: ManagedRegion) -> None:
        region.copied_bytes = region.layers_ready = 0
        known = region.residency
        region.move(known.resumed() if known.state == "RESIDENT" else known.unparking())

    async def _fill(self, region: ManagedRegion) -> None:
        try:
            region.image_fd = image.create_image(region.size_bytes)
        except KernelError as error:
            raise from_kernel_error(error) from error
        fd = await self._keeper.give_memory(region)
        region.filling = True
        loop = asyncio.get_running_loop()
        self._fill_timer = loop.call_later(FILL_TIMEOUT_S, self._channel.close)
        self.send(Fill(region.residency.generation), _with_image(fd, region))
        self.attached = True
        log.info("filling", region=region.name, pid=self.pid, size_bytes=region.size_bytes)

    # What a tenant reports.

    def _copied(self, region: ManagedRegion, copied: Copied) -> None:
        if copied.copied_bytes > region.size_bytes:
            raise Refusal(
                "BAD_MESSAGE",
                f"copied_bytes must be {region.size_bytes} at most, got {copied.copied_bytes}",
            )
        region.copied_bytes, region.layers_ready = copied.copied_bytes, copied.layers_ready
        if copied.done and region.residency.state == "UNPARKING" and not region.filling:
            region.move(region.residency.all_loaded())
            region.returned_s = self._keeper.clock()
        else:
            region.tell()

    async def _filled(self, region: ManagedRegion, filled: Filled) -> None:
        if not region.filling:
            raise Refusal("BAD_MESSAGE", "FILLED without FILL")
        _check_tensors(filled.tensors, region.size_bytes)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(None, _image_checksum, region.image_fd)
        if found != filled.checksum:
            raise Refusal("CHECKSUM_MISMATCH", f"the image has {found}, not {filled.checksum}")
        image.seal_image(region.image_fd)
        region.tensors = filled.tensors
        region.copied_bytes = region.size_bytes
        region.move(region.residency.all_loaded())
        self._end_fill(region)
        self.send(Ready(region.residency.generation))
        log.info("filled", region=region.name, pid=self.pid)

    def _end_fill(self, region: ManagedRegion) -> None:
        region.filling = False
        region.lock.release()
        if self._fill_timer is not None:
            self._fill_timer.cancel()
            self._fill_timer = None

    def _gone(self) -> None:
        """Take the tenant off its region, which holds whatever it holds."""
        region, self.region, self.attached = self.region, None, False
        if region is None or region.lease is not self:
            return
        region.lease = None
        region.wanted = region.busy = False
        if region.filling:
            self._end_fill(region)
            self._keeper.forget(region)
        elif region.residency.state == "UNPARKING":
            region.move(region.residency.interrupted())
        else:
            region.let_go()
            region.tell()


def _check_tensors(tensors: messages.Tensors, size_bytes: int) -> None:
    names = {tensor.name for tensor in tensors}
    if not tensors or len(names) != len(tensors):
        raise Refusal("BAD_MESSAGE", "FILLED.tensors must name each tensor once, and at least one")
    beyond = [tensor for tensor in tensors if tensor.offset >= size_bytes]
    if beyond:
        raise Refusal("BAD_MESSAGE", f"tensor {beyond[0].name} begins past the region's end")


def _image_checksum(fd: int) -> str:
    mapped = image.open_image(fd, writable=False)
    try:
        return image.checksum(mapped.bytes_)
    finally:
        mapped.close()


def _with_image(fd: int, region: ManagedRegion) -> list[int]:
    """A region's descriptor and a copy of its image's, or neither (OSError)."""
    try:
        return [fd, os.dup(region.image_fd)]
    except OSError:
        os.close(fd)  # it would keep the bytes for ever
        raise
