"""Whether a model's weights are on the device, and who may use or move them now.

Stands between the pass (`cuda_backend` holds the weights for as long as it runs), the lease's
thread (`lease`: memory comes, memory is asked back) and the service (state, idleness). Only one of
them uses the device at a time: the lease's thread while nothing can be held, the pass while it
holds. When memory is asked back during a pass, the pass gives it back at its end.

    LOST ──▶ PARKED ──▶ ARRIVING ──▶ RESIDENT ──▶ LEAVING ──▶ PARKED
    (no landlord; from everywhere)                            FAILED (from everywhere)

Refuses to hold (Unavailable) when the landlord does not answer or refused this drafter, and
(Cancelled) when the caller's stop is set while it waits; it waits as long as its caller does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TypeAlias

from drafter_svc.region import LeasedRegion
from kernels.device import Mark
from kernels.errors import KernelError
from kernels.ipc.messages import (
    Copied,
    Filled,
    FromTenant,
    Hello,
    Idle,
    Parked,
    Region,
    Unmapped,
    Want,
)
from skim.errors import Cancelled, EngineFault, SkimError, Unavailable
from skim.log import get_logger

log = get_logger()

# How often a pass that waits looks at its stop; memory that comes wakes it at once.
POLL_S = 0.02
# A landlord that restarts is back within this; its drafter's requests are refused after it.
PATIENCE_S = 5.0

# For each layer the mark that says its weights have arrived; empty: all have.
Arrivals: TypeAlias = tuple[Mark, ...]


class Phase(Enum):
    """Where the weights are."""

    LOST = "lost"  # no landlord has answered for them
    PARKED = "parked"
    ARRIVING = "arriving"  # memory is there, not all of the weights
    RESIDENT = "resident"
    LEAVING = "leaving"  # asked back; a pass may still run
    FAILED = "failed"  # refused, or the device failed


class Residency:
    """One model's weights in the memory plane.

    Args:
        model: the drafter's name, for people.
        gpu_uuid: of the device.
        region: where the weights lie.
        send: tells the landlord; nothing happens where there is none.
        patience_s: see `PATIENCE_S`.

    Attributes:
        on_release: gives back what passes keep on the device beside the weights; returns bytes.
    """

    def __init__(
        self,
        model: str,
        gpu_uuid: str,
        region: LeasedRegion,
        send: Callable[[FromTenant], None],
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.model, self._gpu_uuid = model, gpu_uuid
        self._region, self._send, self._patience_s = region, send, patience_s
        self.on_release: Callable[[], int] = lambda: 0
        self._changed = threading.Condition()
        self._phase, self._lost_s = Phase.LOST, time.monotonic()
        self._generation = 0
        self._arrivals: Arrivals | None = None  # None: nobody may hold
        self._busy = False  # a pass holds
        self._answer: int | None = None  # generation of the QUIESCE that waits for the pass
        self._wanted, self._want_at_s = False, 0.0
        self._stirred = False  # said something since the last IDLE that IDLE takes back
        self._error: SkimError | None = None

    # ---- the pass --------------------------------------------------------------------

    @contextmanager
    def hold(self, stop: threading.Event, waiting: Callable[[], None]) -> Iterator[Arrivals]:
        """Keep the weights where they are; waits until they are on the device.

        Args:
            stop: ends the wait.
            waiting: called once if the weights are not there yet.
        Yields:
            The marks that a pass waits for, layer by layer; empty when everything is there.
        Raises:
            Cancelled: `stop` was set.
            Unavailable: there is no landlord, or it refused this drafter.
        """
        arrivals = self._take(stop, waiting)
        try:
            yield arrivals
        finally:
            self._leave()

    def _take(self, stop: threading.Event, waiting: Callable[[], None]) -> Arrivals:
        begun_s, told = time.monotonic(), False
        with self._changed:
            while self._arrivals is None or self._busy:
                if stop.is_set():
                    raise Cancelled("the request was stopped while it waited for device memory")
                self._check_landlord(begun_s)
                if not told:
                    told = True
                    waiting()
                self._ask()
                self._changed.wait(POLL_S)
            self._busy = self._stirred = True
            return self._arrivals

    def _check_landlord(self, begun_s: float) -> None:
        if self._phase is Phase.FAILED:
            raise Unavailable(
                f"the weights of {self.model!r} have no place on the GPU: {self._error}",
                reason="MEMORY_PLANE_REFUSED",
                retry_after_s=self._patience_s,
            )
        since_s = time.monotonic() - max(begun_s, self._lost_s)
        if self._phase is Phase.LOST and since_s >= self._patience_s:
            raise Unavailable(
                f"no landlord of the GPU's memory has answered for {since_s:.1f} s",
                reason="MEMORY_PLANE_LOST",
                retry_after_s=self._patience_s,
            )

    def _ask(self) -> None:
        if self._phase is Phase.PARKED and not self._wanted:
            if time.monotonic() >= self._want_at_s:
                self._wanted = self._stirred = True
                self._send(Want())

    def _leave(self) -> None:
        with self._changed:
            if self._phase is not Phase.LEAVING:
                self._busy = False
                self._changed.notify_all()
                return
        try:
            self._let_go()
        except KernelError as error:  # the landlord will revoke the lease; the answer is scored
            log.error("region_not_let_go", model=self.model, message=str(error))
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    # ---- the service -----------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Where the weights are now; no sooner and no later than the landlord hears of it."""
        with self._changed:
            return self._phase

    @property
    def mapped(self) -> bool:
        """Whether device memory is taken."""
        return self._region.mapped

    def idle(self) -> None:
        """No request is queued or running: tell the landlord, unless it knows or has no place."""
        with self._changed:  # so that none follows the HELLO of the model that comes after
            stirred, self._stirred = self._stirred, False
            self._wanted = False  # it takes a WANT back that was not answered
            if stirred and self._phase not in (Phase.LOST, Phase.FAILED):
                self._send(Idle())

    def settle(self, closing: threading.Event, timeout_s: float | None) -> None:
        """Wait until the landlord has given the weights a place, on the device or parked.

        Raises:
            SkimError: it refused, or filling failed: the reason.
            Unavailable: `closing` was set, or no answer came in time.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._phase not in (Phase.PARKED, Phase.RESIDENT):
                if self._phase is Phase.FAILED and self._error is not None:
                    raise self._error
                if closing.is_set() or (until_s is not None and time.monotonic() >= until_s):
                    raise Unavailable(
                        f"the landlord of the GPU's memory gave {self.model!r} no place",
                        reason="MEMORY_PLANE_LOST",
                        retry_after_s=self._patience_s,
                    )
                self._changed.wait(POLL_S)

    def close(self) -> None:
        """Give region, image and addresses up; idempotent, after the lease has ended for it."""
        self._region.close()

    # ---- the lease's thread ----------------------------------------------------------

    def hello(self) -> Hello:
        """What asks for the region."""
        region = self._region
        return Hello(
            pid=os.getpid(),
            gpu_uuid=self._gpu_uuid,
            model=self.model,
            model_digest=region.model_digest,
            layout_digest=region.layout_digest,
            size_bytes=region.size_bytes,
        )

    def park(self, message: Parked, fds: list[int]) -> None:
        """The landlord has the image and no room; raises as `LeasedRegion.take_image` does."""
        self._region.take_image(fds[0], message.tensors)
        self._set(Phase.PARKED, message.generation)

    def attach(self, message: Region, fds: list[int]) -> None:
        """Map the region, and copy the image into it unless it is loaded.

        From the first layer's mark on a pass may begin. Returns when all has arrived. Takes the
        region's descriptor out of `fds`.

        Raises:
            HandleError, ProtocolError: see `LeasedRegion`.
        """
        self._set(Phase.ARRIVING, message.generation)
        self._region.map(fds.pop(0))
        if message.tensors is not None:
            self._region.take_image(fds[0], message.tensors)
        if not message.loaded:
            self._copy(message.generation)
        self._set(Phase.RESIDENT, message.generation, ())

    def _copy(self, generation: int) -> None:
        marks = self._region.copy_in()
        self._set(Phase.ARRIVING, generation, marks)
        layers = len(marks)
        for ready, (mark, end) in enumerate(zip(marks, self._region.ends, strict=True), 1):
            mark.wait()
            self._send(Copied(generation, end, ready, ready == layers))

    def fill(self, generation: int, fds: list[int]) -> None:
        """Fill the region and the image of a model that the landlord does not know.

        Takes the region's descriptor out of `fds`. Nobody may hold before `ready`.

        Raises:
            ModelFileError, KernelError: see `LeasedRegion.fill`.
        """
        self._set(Phase.ARRIVING, generation)
        self._region.map(fds.pop(0))
        digest = self._region.fill(fds[0])
        self._send(Filled(generation, self._region.tensors, digest))

    def ready(self, generation: int) -> None:
        """The landlord checked what `fill` wrote."""
        if self._phase is Phase.ARRIVING and generation == self._generation:
            self._set(Phase.RESIDENT, generation, ())

    def quiesce(self, generation: int) -> None:
        """Give the memory back: now, or when the pass that runs has ended."""
        with self._changed:
            if generation < self._generation:
                log.info("quiesce_ignored", model=self.model, generation=generation)
                return
            self._arrivals, self._answer = None, generation
            self._phase, self._generation = Phase.LEAVING, generation
            if self._busy:
                return
        self._let_go()

    def delayed(self) -> None:
        """The landlord answers, but cannot give a place yet: whoever waits goes on waiting."""
        self._lost_s = time.monotonic()

    def no_room(self, retry_after_s: float) -> None:
        """The landlord cannot give what a pass waits for; ask again later."""
        with self._changed:
            self._wanted = False
            self._want_at_s = time.monotonic() + retry_after_s

    def lose(self) -> None:
        """The landlord is gone, or another model takes this one's place.

        Waits for the pass that runs, lets the region go, keeps the image.
        """
        with self._changed:
            self._arrivals = self._answer = None
            self._phase = Phase.LEAVING
            while self._busy:
                self._changed.wait()
        self._let_go()

    def end(self, error: SkimError | None) -> None:
        """The lease ended; with an error nobody may hold until a later lease brings memory."""
        try:
            self.lose()
        except KernelError as broken:
            error = error or EngineFault(f"the device failed: {broken}", reason="GPU_FAULT")
        if error is not None:
            with self._changed:
                self._phase, self._error = Phase.FAILED, error
                self._changed.notify_all()

    def _set(self, phase: Phase, generation: int, arrivals: Arrivals | None = None) -> None:
        with self._changed:
            self._phase, self._generation, self._arrivals = phase, generation, arrivals
            self._wanted, self._want_at_s, self._error = False, 0.0, None
            self._stirred |= phase is Phase.RESIDENT
            self._changed.notify_all()

    def _let_go(self) -> None:
        """Unmap, tell whoever asked, and say so here: in this order, so that no WANT overtakes."""
        try:
            workspace_bytes = self.on_release()
        finally:  # a device that fails must not keep the bytes from everybody
            self._region.unmap()
        with self._changed:
            answer, self._answer = self._answer, None
            if answer is not None:
                self._send(Unmapped(answer, workspace_bytes))
            self._phase = Phase.LOST if answer is None else Phase.PARKED
            self._lost_s = time.monotonic()
            self._wanted, self._want_at_s = False, 0.0
            self._changed.notify_all()
