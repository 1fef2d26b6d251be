"""Compiles a kernel's source, and the emulator's runtime, with g++ into shared objects.

A build is named by the hash of everything it is made of (all included texts, defines, compiler), so
that a second test session finds it. Nothing here runs a kernel.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kernels.device import KernelSource
from kernels.errors import CompileError

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels" / "cuda"
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
RUNTIME = ("runtime.cpp", "meetings.cpp", "copies.cpp", "tensor_copies.cpp", "products.cpp")
FLAGS = ("-std=c++17", "-fPIC", "-shared", "-g1", "-ffp-contract=off")
KERNEL_FLAGS = (
    *FLAGS,
    "-O2",
    "-DSKIM_EMULATED",
    "-fno-strict-aliasing",
    "-fsanitize=alignment,bounds",
    "-fsanitize-undefined-trap-on-error",
    "-w",
)
POISONED_LOCALS = "-ftrivial-auto-var-init=pattern"  # g++ 12 and later: registers read unset show
WRAPPER = """#include "runtime.h"
namespace {{
#include "cuda.h"
#include "{file}"
#include "entry.h"
{entries}
"""
ENTRY = re.compile(
    r'extern "C" __global__ void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\('
)


@dataclass(frozen=True)
class Edit:
    """A change to a source before it is compiled: plants a defect that a test must find.

    Attributes:
        file: name in `kernels/cuda`.
        old: text that stands in it exactly once.
        new: what takes its place.
    """

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """The changed text; ValueError when `old` does not stand there exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {self.old!r} {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)


def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"skim-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


@lru_cache(maxsize=1)
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout


@lru_cache(maxsize=1)
def _kernel_flags() -> tuple[str, ...]:
    command = ["g++", POISONED_LOCALS, "-fsyntax-only", "-x", "c++", os.devnull]
    known = subprocess.run(command, capture_output=True).returncode == 0
    return (*KERNEL_FLAGS, POISONED_LOCALS) if known else KERNEL_FLAGS


def build_shared(
    name: str, command: Sequence[str], parts: Sequence[str], folder: Path | None = None
) -> tuple[Path, str]:
    """Compile in `folder` unless it was before; the shared object, or the log of a refusal.

    Args:
        name: what its file is called, with a hash of the rest.
        command: of the compiler, without the output.
        parts: texts of all that is compiled.
        folder: where the command runs.
    """
    key = hashlib.sha256("\0".join([_compiler_version(), *command, *parts]).encode()).hexdigest()
    target = _cache_folder() / f"{name}-{key[:24]}.so"
    if target.exists():
        return target, ""
    scratch = target.with_suffix(f".{os.getpid()}")
    command = [*command, "-o", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        return target, done.stderr[:8000]
    scratch.rename(target)
    return target, ""


@lru_cache(maxsize=1)
def load_runtime() -> ctypes.CDLL:
    """Build and load the runtime; kernels find its symbols from then on."""
    parts = [(HERE / name).read_text() for name in (*RUNTIME, "runtime.h", "scheduler.h")]
    sources = [str(HERE / name) for name in RUNTIME]
    path, log = build_shared("runtime", ["g++", *FLAGS, "-O3", *sources], parts)
    if log:
        raise CompileError("emulator runtime", "the CPU", log)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _sources(file: str, folder: Path, edits: Sequence[Edit]) -> dict[str, str]:
    """The kernel's file and what it includes, from `folder` or else `KERNELS`: text by name."""
    found: dict[str, str] = {}
    waiting = [file]
    while waiting:
        name = waiting.pop()
        place = next((at / name for at in (folder, KERNELS) if (at / name).exists()), None)
        if name in found or place is None:
            continue
        found[name] = place.read_text(encoding="utf-8")
        waiting += INCLUDE.findall(found[name])
    for edit in edits:
        if edit.file not in found:
            raise ValueError(f"{file} does not include {edit.file}")
        found[edit.file] = edit.apply(found[edit.file])
    return found


@lru_cache(maxsize=1024)
def build_kernel(
    source: KernelSource, arch: str, folder: Path = KERNELS, edits: tuple[Edit, ...] = ()
) -> Path:
    """Shared object with the entries of a file under the defines, compiled as for `arch`.

    Raises:
        CompileError: g++ refused it; the message holds its log.
    """
    texts = _sources(source.file, folder, edits)
    if source.file not in texts:
        raise CompileError(str(source), arch, f"{source.file} is not in {folder}")
    number = re.sub(r"\D", "", arch)
    defines = [f"-D__CUDA_ARCH__={number}0", *(f"-D{key}={value}" for key, value in source.defines)]
    if arch == "sm_90a":
        defines.append("-D__CUDA_ARCH_FEAT_SM90_ALL")
    found = dict.fromkeys([*ENTRY.findall(texts[source.file]), source.entry])
    path, log = _compile(source.file, texts, tuple(found), defines)
    if log and len(found) > 1:  # an entry may stand under other defines alone
        path, log = _compile(source.file, texts, (source.entry,), defines)
    if log:
        raise CompileError(str(source), f"the CPU as {arch}", log)
    return path


def _compile(
    file: str, texts: dict[str, str], entries: tuple[str, ...], defines: Sequence[str]
) -> tuple[Path, str]:
    lines = "\n".join(f"EMU_ENTRY({entry})" for entry in entries)
    texts = {**texts, "wrapper.cpp": WRAPPER.format(file=file, entries=lines)}
    parts = [*texts.values(), *(path.read_text() for path in sorted(HERE.glob("*.h")))]
    with tempfile.TemporaryDirectory(prefix="skim-emulator-") as scratch:
        for name, text in texts.items():
            (Path(scratch) / name).write_text(text, encoding="utf-8")
        # Quoted includes are sought beside the including file, then in the include paths.
        command = ["g++", *_kernel_flags(), *defines, f"-I{HERE}", "-x", "c++", "wrapper.cpp"]
        return build_shared(file.removesuffix(".cu"), command, parts, Path(scratch))


def source_line(path: Path, offset: int) -> str:
    """File and line of an instruction, or nothing where addr2line is missing or finds none."""
    try:
        done = subprocess.run(
            ["addr2line", "-e", str(path), hex(offset)], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    place = done.stdout.strip().rsplit("/", 1)[-1]
    return "" if place.startswith("?") else place
