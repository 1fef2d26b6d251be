"""Where a region's weights are: the states, the steps between them, and what a generation proves.

Pure. The landlord keeps one `Residency` a region and moves it by these steps alone; a step that the
state does not allow is a defect of ours and raises EngineFault.

    fill → UNPARKING ── loaded ──▶ RESIDENT ── parking ──▶ PARKING ── parked ──▶ PARKED
               ▲  ▲                  │  ▲                     │                    │
               │  └──── resumed ─────┘  └── interrupted (its  └── failed ─▶ FAILED │
               │                            tenant died)                      │    │
               └───────────────────────────── unparking ──────────────────────┴────┘

A region that is being parked or unparked can be asked for again: `park_step` and `unpark_step` say
what a caller, who saw some generation, is owed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from skim.errors import EngineFault

State = Literal["RESIDENT", "PARKING", "PARKED", "UNPARKING", "FAILED"]
Age = Literal["now", "older", "newer"]
Step = Literal["move", "join", "done", "mismatch"]


@dataclass(frozen=True)
class Residency:
    """One region's residency.

    Attributes:
        state: FAILED: parked, but its bytes did not come free.
        generation: grows by one at each park and unpark.
        loaded: its device memory holds all the weights.
    """

    state: State = "UNPARKING"
    generation: int = 1
    loaded: bool = False

    @property
    def has_memory(self) -> bool:
        """Whether device memory stands behind the region."""
        return self.state in ("RESIDENT", "PARKING", "UNPARKING")

    def all_loaded(self) -> Residency:
        """The tenant has copied, or written, everything."""
        return self._step("UNPARKING", to="RESIDENT", loaded=True)

    def interrupted(self) -> Residency:
        """The tenant that copied is gone: the memory stays, half full."""
        return self._step("UNPARKING", to="RESIDENT", loaded=False)

    def resumed(self) -> Residency:
        """Another tenant copies what was left half full."""
        if self.loaded:
            raise EngineFault("a loaded region cannot be loaded again")
        return self._step("RESIDENT", to="UNPARKING")

    def parking(self) -> Residency:
        """The tenant is told to let go."""
        return self._step("RESIDENT", "UNPARKING", to="PARKING")

    def parked(self) -> Residency:
        """The memory is back, counted."""
        return self._step("PARKING", to="PARKED", grown=1, loaded=False)

    def failed(self) -> Residency:
        """Our handle is closed, but fewer bytes came free than the region holds."""
        return self._step("PARKING", to="FAILED", grown=1, loaded=False)

    def found_free(self) -> Residency:
        """The bytes that were missing have come free."""
        return self._step("FAILED", to="PARKED")

    def unparking(self) -> Residency:
        """New memory is there, and the tenant is told to fill it."""
        return self._step("PARKED", "FAILED", to="UNPARKING", grown=1)

    def age(self, generation: int) -> Age:
        """How a message that names a generation stands to this one."""
        if generation == self.generation:
            return "now"
        return "older" if generation < self.generation else "newer"

    def park_step(self, expect_generation: int) -> Step:
        """What a Park that saw `expect_generation` (0: any) has to do; `join`: wait for it."""
        if self.state in ("PARKED", "FAILED"):
            # Parking grew the generation: who saw the one before has got what it asked for.
            seen = expect_generation in (0, self.generation, self.generation - 1)
            return ("done" if self.state == "PARKED" else "move") if seen else "mismatch"
        if expect_generation not in (0, self.generation):
            return "mismatch"
        return "join" if self.state == "PARKING" else "move"

    def unpark_step(self, expect_generation: int) -> Step:
        """What an Unpark that saw `expect_generation` (0: any) has to do."""
        if self.state in ("RESIDENT", "UNPARKING"):
            seen = expect_generation in (0, self.generation, self.generation - 1)
            done = "done" if self.state == "RESIDENT" and self.loaded else "join"
            return done if seen else "mismatch"  # type: ignore[return-value]
        return "move" if expect_generation in (0, self.generation) else "mismatch"

    def _step(
        self, *allowed: State, to: State, grown: int = 0, loaded: bool | None = None
    ) -> Residency:
        if self.state not in allowed:
            raise EngineFault(
                f"a region cannot become {to} now", got=self.state, allowed=" or ".join(allowed)
            )
        return replace(
            self,
            state=to,
            generation=self.generation + grown,
            loaded=self.loaded if loaded is None else loaded,
        )
