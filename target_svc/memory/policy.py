"""Who gets the GPU's bytes: parked for whom, returned when, refused why. Pure; tested by tables.

The landlord gathers facts, asks here, and acts; no clock, no device and no socket is known here.

- `auto`: drafters are resident, give way to a full context, and come back as soon as they fit.
- `always`: a drafter is resident only while it scores.
- `never`: nobody is parked but by a person; a full context gets what is free, or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from target_svc.memory.residency import State

ParkPolicy = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Rules:
    """What the operator chose.

    Attributes:
        policy: see above.
        min_resident_s: `auto` only: how long a drafter stays after it came back, so that mixed load
            does not thrash.
        unpark_grace_s: how long a copy may take before it is interrupted for a full context.
    """

    policy: ParkPolicy = "auto"
    min_resident_s: float = 2.0
    unpark_grace_s: float = 5.0


@dataclass(frozen=True)
class RegionFacts:
    """One region, as far as decisions need it.

    Attributes:
        name: of the drafter.
        state: where its weights are.
        size_bytes: of its device memory.
        leased: a tenant is attached.
        wanted: its tenant said WANT and has not got the region yet.
        busy: its tenant said WANT, and not yet IDLE.
        kept_down: a person parked it.
        moving: it is being filled, parked or brought back right now.
        since_s: when it came into its state.
        returned_s: when its last unpark ended; None: it was never unparked.
        workspace_bytes: what its tenant's own arena last gave back.
    """

    name: str
    state: State
    size_bytes: int
    leased: bool = True
    wanted: bool = False
    busy: bool = False
    kept_down: bool = False
    moving: bool = False
    since_s: float = 0.0
    returned_s: float | None = None
    workspace_bytes: int = 0


@dataclass(frozen=True)
class Enough:
    """The bytes are free."""


@dataclass(frozen=True)
class Park:
    """Park these, then ask again."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """Ask again when something changed, or at `until_s` (None: only then)."""

    until_s: float | None


@dataclass(frozen=True)
class Impossible:
    """The bytes cannot be had; `limit_bytes` can."""

    limit_bytes: int


RoomStep = Enough | Park | Wait | Impossible


@dataclass(frozen=True)
class Hold:
    """Bytes promised to a full context.

    Attributes:
        num_bytes: promised.
        others_bytes: used by others than the regions when they were granted; None: not granted yet.
    """

    num_bytes: int
    others_bytes: int | None = None

    def still_to_come(self, others_bytes: int) -> int:
        """Bytes of the promise that are not taken yet, given what others use now."""
        if self.others_bytes is None:
            return self.num_bytes
        return max(0, self.num_bytes - max(0, others_bytes - self.others_bytes))


def room_step(
    rules: Rules,
    regions: Sequence[RegionFacts],
    *,
    need_bytes: int,
    free_bytes: int,
    budget_bytes: int,
    now_s: float,
) -> RoomStep:
    """Say what has to happen before a full context of `need_bytes` can be created.

    Parks as few as possible: those without a tenant first, then the largest. Where the sizes alone
    do not suffice all are parked, for a tenant's workspace comes free with them, before the answer
    is that it cannot be.
    """
    if need_bytes <= free_bytes:
        return Enough()
    if rules.policy == "never" or need_bytes > budget_bytes:
        return Impossible(max(0, free_bytes))
    ready, later_s = [], []
    for region in regions:
        ready_s = _parkable_s(rules, region)
        if ready_s is not None and ready_s <= now_s:
            ready.append(region)
        elif ready_s is not None or region.moving:
            later_s.append(ready_s)
    ready.sort(key=lambda region: (region.leased, -region.size_bytes))
    missing = need_bytes - free_bytes
    for count, _ in enumerate(ready, start=1):
        if sum(region.size_bytes for region in ready[:count]) >= missing:
            return Park(tuple(region.name for region in ready[:count]))
    if later_s:  # nobody is parked for a sum that needs others too
        return Wait(min((at for at in later_s if at is not None), default=None))
    if ready:
        return Park(tuple(region.name for region in ready))
    return Impossible(max(0, free_bytes))


def _parkable_s(rules: Rules, region: RegionFacts) -> float | None:
    """From when on a region may be parked for a full context; None: not now."""
    if region.moving:
        return None
    if region.state == "UNPARKING":
        return region.since_s + max(rules.unpark_grace_s, rules.min_resident_s)
    if region.state != "RESIDENT":
        return None
    if rules.policy == "auto" and region.leased and region.returned_s is not None:
        return region.returned_s + rules.min_resident_s
    return 0.0


def comes_back(rules: Rules, region: RegionFacts, *, rooms_waiting: bool) -> bool:
    """Whether a region should be brought back, if it fits."""
    if region.state not in ("PARKED", "FAILED") or not region.leased or region.moving:
        return False
    if region.wanted:
        return True
    # Nobody waits for it: not worth it just before the next full context.
    return rules.policy != "always" and not region.kept_down and not rooms_waiting


def goes_down(rules: Rules, region: RegionFacts) -> bool:
    """Whether a region should be parked although nobody needs its bytes."""
    return (
        rules.policy == "always"
        and region.state == "RESIDENT"
        and not region.busy
        and not region.moving
    )


def free_for_region(hold: Hold | None, *, free_bytes: int, others_bytes: int) -> int:
    """Bytes that a region may take now: what is free, less what is promised and not yet taken."""
    return free_bytes - (hold.still_to_come(others_bytes) if hold is not None else 0)


def region_need(region: RegionFacts, hold: Hold | None) -> int:
    """Bytes a region needs to come back; beside a full context its workspace must fit too."""
    return region.size_bytes + (region.workspace_bytes if hold is not None else 0)
