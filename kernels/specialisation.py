"""Which variants of which kernel exist: the table that launchers choose from and tests compile.

A module of `kernels.ops` states each kernel once, as a `Family`: file, entry, and the values that
each define may take. A launcher gets its `KernelSource` from the family alone, so that a variant
outside the table cannot be launched; a test compiles every variant for every architecture.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil

from kernels.device import KernelSource
from kernels.errors import InvalidArgument

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100")  # what every portable kernel is compiled for
HOPPER = ("sm_90a",)  # wgmma and TMA
OLDEST_CAPABILITY = (8, 0)  # bf16 tensor cores and cp.async
LEAST_SHARED_BYTES = 99 << 10  # that a block of threads can have: 8.6, 8.9 and 12.0
_SHARED_BYTES = {"sm_80": 163 << 10, "sm_87": 163 << 10, "sm_90a": 227 << 10}
_SHARED_BYTES |= {"sm_100": 227 << 10, "sm_103": 227 << 10}


def arch_of(major: int, minor: int) -> str:
    """What is compiled for a GPU's compute capability; 9.0 gets its own instructions."""
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def most_shared_bytes(arch: str) -> int:
    """Shared memory that a block of threads can have; of an unknown GPU, the least of the known."""
    return _SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)


class Family:
    """One kernel entry and the defines it is compiled under.

    Args:
        file: source in `kernels/cuda`.
        entry: its `extern "C"` name.
        archs: architectures it is written for.
        values: for each define, the values it may take; the variants are their product.
    """

    def __init__(
        self,
        file: str,
        entry: str,
        *,
        archs: tuple[str, ...] = ARCHS,
        **values: tuple[int | str, ...],
    ) -> None:
        self.file, self.entry, self.archs, self.values = file, entry, archs, values
        self._sources = {
            chosen: KernelSource(file, entry, tuple(zip(values, chosen, strict=True)))
            for chosen in itertools.product(*values.values())
        }

    def source(self, **defines: int | str) -> KernelSource:
        """The variant under exactly these defines; InvalidArgument names one that is not listed."""
        if len(defines) == len(self.values):
            found = self._sources.get(tuple(defines.get(name, "") for name in self.values))
            if found:
                return found
        allowed = ", ".join(f"{name} in {values}" for name, values in self.values.items())
        raise InvalidArgument.value(self.entry, "its defines", defines, allowed or "none")

    def sources(self) -> tuple[KernelSource, ...]:
        """Every variant, in the order of the values."""
        return tuple(self._sources.values())


def families() -> tuple[Family, ...]:
    """Every family that a module of `kernels.ops` states at module level, without repeats."""
    package = importlib.import_module("kernels.ops")
    found: dict[int, Family] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, Family):
                found[id(value)] = value
    return tuple(found.values())
