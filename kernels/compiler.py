"""CUDA C++ to machine code: one source under its defines, for one architecture, by NVRTC.

`CudaDevice` asks for a cubin when a kernel is first launched, tests and `bench.kernel_report` for
every variant there is; neither a GPU nor a driver is needed to compile. The result is always a
cubin, never PTX, which a driver older than NVRTC could not load. Cubins are kept on disk under a
key of the source, every header beside it, the options and NVRTC's version. Sources include files
of `kernels/cuda` alone. Fast-math is off: only what a source writes as approximate is approximate.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cuda.core import Program, ProgramOptions
from cuda.core.utils import FileStreamProgramCache, make_program_cache_key

from kernels.device import KernelSource
from kernels.errors import CompileError, InvalidArgument

SOURCES = Path(__file__).resolve().parent / "cuda"
CACHE_BYTES = 256 << 20  # a cubin has 10 to 300 KB; the least recently used ones go first


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a multiprocessor, as the assembler reports it.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread's local memory.
        spill_store_bytes: written to local memory for want of registers.
        spill_load_bytes: read back.
        shared_bytes: static shared memory of a block; what a launch asks for comes on top.
    """

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int


class Report(NamedTuple):
    """A source compiled, with what the assembler says about it.

    Attributes:
        cubin: machine code.
        resources: by the entry's name.
        remarks: losses of speed that the assembler saw, such as wgmma made serial or setmaxnreg
            ignored.
    """

    cubin: bytes
    resources: dict[str, Resources]
    remarks: tuple[str, ...]


def default_cache_dir() -> Path | None:
    """`skim/kernels` under the user's cache folder; None for a user who has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "skim" / "kernels"
    try:
        return Path.home() / ".cache" / "skim" / "kernels"
    except RuntimeError:  # no HOME, and the user is in no list of users
        return None  # not a temporary folder: whoever else writes there could place machine code


class Compiler:
    """Compiles sources of one folder and keeps the cubins.

    Args:
        cache_dir: where cubins are kept; None, or a folder that cannot be written: nowhere.
        sources: the folder of the .cu and .cuh files.
    """

    def __init__(self, cache_dir: Path | None = None, sources: Path = SOURCES) -> None:
        self._sources = sources
        self._cache: FileStreamProgramCache | None = None
        if cache_dir is not None:
            try:
                self._cache = FileStreamProgramCache(cache_dir, max_size_bytes=CACHE_BYTES)
            except OSError:
                pass  # a read-only home costs some seconds at each start, not the service
        self._headers = _digest(sorted(sources.glob("*.cuh")))

    def cubin(self, source: KernelSource, arch: str) -> bytes:
        """Machine code of every entry in the source's file, from the cache if it is there.

        Raises:
            InvalidArgument: there is no such file.
            CompileError: NVRTC refused it; the message holds its log.
        """
        code, options = self._read(source), self._options(source, arch)
        if self._cache is None:
            return _compile(source, arch, code, options)
        key = make_program_cache_key(
            code=code,
            code_type="c++",
            options=options,
            target_type="cubin",
            extra_digest=self._headers,
        )
        try:
            found: bytes | None = self._cache.get(key)
        except OSError:
            found = None
        if found is None:
            found = _compile(source, arch, code, options)
            with suppress(OSError):  # a full or read-only disk costs the cache, not the launch
                self._cache[key] = found
        return found

    def report(self, source: KernelSource, arch: str) -> Report:
        """Compile anew and say what each entry of the file takes. Errors as in `cubin`."""
        log = io.StringIO()
        options = self._options(source, arch, ptxas_options=["-v"])
        cubin = _compile(source, arch, self._read(source), options, log)
        return Report(cubin, parse_resources(log.getvalue()), parse_remarks(log.getvalue()))

    def _read(self, source: KernelSource) -> str:
        path = self._sources / source.file
        if path.parent != self._sources or not path.is_file():
            listed = ", ".join(sorted(found.name for found in self._sources.glob("*.cu")))
            raise InvalidArgument.value(source.entry, "file", source.file, f"one of {listed}")
        return path.read_text(encoding="utf-8")

    def _options(
        self, source: KernelSource, arch: str, ptxas_options: list[str] | None = None
    ) -> ProgramOptions:
        return ProgramOptions(
            name=str(self._sources / source.file),  # so that logs and profilers name the file
            arch=arch,
            std="c++17",
            lineinfo=True,
            include_path=str(self._sources),
            define_macro=[(name, str(value)) for name, value in source.defines] or None,
            ptxas_options=ptxas_options,
        )


def _digest(paths: list[Path]) -> bytes:
    summed = hashlib.sha256()
    for path in paths:
        text = path.read_bytes()
        summed.update(f"{path.name} {len(text)}\n".encode() + text)
    return summed.digest()


def _compile(
    source: KernelSource,
    arch: str,
    code: str,
    options: ProgramOptions,
    log: io.StringIO | None = None,
) -> bytes:
    try:
        program = Program(code, "c++", options)
        try:
            return bytes(program.compile("cubin", logs=log).code)
        finally:
            program.close()
    except Exception as error:  # cuda.core's own tree is private; all of it means: not compiled
        raise CompileError(str(source), arch, str(error)) from error


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse_remarks(log: str) -> tuple[str, ...]:
    """Lines of the assembler's report that tell of lost speed."""
    telling = ("Performance Loss", "setmaxnreg", "serialized")
    lines = (line.strip() for line in log.splitlines() if line.startswith("ptxas"))
    return tuple(line for line in lines if any(words in line for words in telling))


def parse_resources(log: str) -> dict[str, Resources]:
    """Read the assembler's report (`-v`): resources by entry name."""
    found: dict[str, Resources] = {}
    entry, frame = "", (0, 0, 0)
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry, frame = match[1], (0, 0, 0)
        elif match := _FRAME.search(line):
            frame = (int(match[1]), int(match[2]), int(match[3]))
        elif (match := _USED.search(line)) and entry:
            found[entry] = Resources(int(match[1]), *frame, int(match[2] or 0))
            entry = ""
    return found
