"""What each kernel takes of a multiprocessor: registers, spills, stack, static shared memory.

    python -m bench.kernel_report [--arch sm_90a] [--json]

Compiles every variant that `kernels.ops` states for every architecture; no GPU is needed. Prints a
Markdown table, one row a variant, then one JSON line. Shared memory that a launch asks for comes
on top and stands in the headers of the sources.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from kernels.compiler import Compiler, Resources
from kernels.device import KernelSource
from kernels.specialisation import ARCHS, families


@dataclass(frozen=True)
class Row:
    """One kernel variant on one architecture."""

    kernel: str
    arch: str
    resources: Resources
    cubin_bytes: int
    remarks: tuple[str, ...]


def compile_unit(unit: tuple[KernelSource, str, tuple[str, ...]]) -> list[Row]:
    """Rows of the wanted entries of one file under some defines, on one architecture."""
    source, arch, entries = unit
    report = Compiler().report(source, arch)
    return [
        Row(
            str(KernelSource(source.file, entry, source.defines)),
            arch,
            report.resources[entry],
            len(report.cubin),
            report.remarks,
        )
        for entry in entries
    ]


def units(archs: tuple[str, ...]) -> list[tuple[KernelSource, str, tuple[str, ...]]]:
    """What to compile: each file once for all of its entries."""
    wanted: dict[tuple[str, tuple[tuple[str, int | str], ...], str], list[str]] = {}
    for family in families():
        for source in family.sources():
            for arch in (arch for arch in family.archs if arch in archs):
                wanted.setdefault((source.file, source.defines, arch), []).append(family.entry)
    return [
        (KernelSource(file, entries[0], defines), arch, tuple(entries))
        for (file, defines, arch), entries in wanted.items()
    ]


def rows(archs: tuple[str, ...]) -> list[Row]:
    """Every row, by kernel and then by architecture; NVRTC compiles one at a time a process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        found = [row for made in pool.map(compile_unit, units(archs)) for row in made]
    return sorted(found, key=lambda row: (row.kernel, ARCHS.index(row.arch)))


def table(found: list[Row], archs: tuple[str, ...]) -> Iterator[str]:
    """Lines of the table: a kernel a line; registers (+ spilled bytes) for each architecture."""
    yield "| kernel | " + " | ".join(archs) + " | static shared |"
    yield "| --- |" + " --- |" * (len(archs) + 1)
    for kernel in dict.fromkeys(row.kernel for row in found):
        mine = {row.arch: row.resources for row in found if row.kernel == kernel}
        cells = [_cell(mine.get(arch)) for arch in archs]
        shared = max(used.shared_bytes for used in mine.values())
        yield f"| {kernel} | " + " | ".join(cells) + f" | {shared} |"


def _cell(used: Resources | None) -> str:
    if used is None:
        return "—"
    spilled = used.spill_store_bytes + used.spill_load_bytes
    stack = f" stack {used.stack_bytes}" if used.stack_bytes else ""
    return f"{used.registers}" + (f" spills {spilled}" if spilled else "") + stack


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_report", description=__doc__)
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--json", action="store_true", help="the JSON line alone")
    options = parser.parse_args()
    archs = tuple(options.arch or ARCHS)
    found = rows(archs)
    if not options.json:
        print("\n".join(table(found, archs)))
    json.dump({"kernels": [asdict(row) for row in found]}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
