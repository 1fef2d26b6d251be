"""One launch on the emulator: the checks of its sizes and arguments, the call, and the explanation.

`device.py` gives a loaded kernel, the arguments and the allocations; the runtime (runtime.cpp) does
the rest. Whatever a GPU would refuse, or do wrong in silence, is a LaunchError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from kernels.device import Arg, KernelSource, TensorMap
from kernels.errors import LaunchError
from tests.emulator.build import load_runtime, source_line

SHARED_LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10}
MAX_THREADS = 1024
MAP_MAGIC = 0x70616D52534E4554
Order = Literal["forward", "reverse"]
Packed = ctypes.c_uint64 | ctypes.c_int32 | ctypes.c_float | ctypes.Structure


class _Index(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


class _Launch(ctypes.Structure):  # the fields of scheduler.h
    _fields_ = [
        ("call", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("static_begin", ctypes.c_void_p),
        ("static_end", ctypes.c_void_p),
        ("grid", _Index),
        ("block", _Index),
        ("shared_bytes", ctypes.c_uint),
        ("reverse", ctypes.c_uint),
        ("workers", ctypes.c_uint),
        ("padding", ctypes.c_uint),
        ("fault_address", ctypes.c_uint64),
        ("fault_instruction", ctypes.c_uint64),
        ("error", ctypes.c_char * 4096),
    ]


class _MapFields(ctypes.Structure):  # the emulated TMap, hopper.cuh
    _fields_ = [
        ("magic", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("row_stride_bytes", ctypes.c_uint64),
        ("box_rows", ctypes.c_uint32),
        ("box_columns", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 80),
    ]


class Kernel:
    """One loaded entry."""

    def __init__(self, path: Path, entry: str) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        call = getattr(self.library, f"emu_call_{entry}")
        self.call = ctypes.cast(call, ctypes.c_void_p).value or 0
        self.base = self.call - _symbol_offset(path, self.call)
        for name in ("emu_static_begin", "emu_static_end"):
            getattr(self.library, name).restype = ctypes.c_void_p
        self.static_begin = self.library.emu_static_begin() or 0
        self.static_end = self.library.emu_static_end() or 0
        signature = getattr(self.library, f"emu_signature_{entry}")
        signature.restype = ctypes.c_char_p
        self.signature: str = signature().decode()


@lru_cache(maxsize=1024)
def load_kernel(path: Path, entry: str) -> Kernel:
    """The entry of a built source, loaded once."""
    return Kernel(path, entry)


def _symbol_offset(path: Path, address: int) -> int:
    """Offset of a loaded address in its file: address minus the start of the mapping."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, *_ = line.split()
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return address - begin + int(offset, 16)
    raise ValueError(f"{path} is not mapped")


_PARAMETERS = {
    "p": "a pointer (int)",
    "l": "a 64-bit integer (int)",
    "i": "a 32-bit integer (numpy.int32)",
    "f": "a float (numpy.float32)",
    "T": "a TensorMap",
}


def check_sizes(
    source: KernelSource,
    arch: str,
    kernel: Kernel,
    grid: tuple[int, ...],
    block: int,
    shared_bytes: int,
) -> None:
    """LaunchError where the grid, the block or its shared memory exceed what `arch` gives."""
    limits = (2**31 - 1, 65535, 65535)
    if not 1 <= len(grid) <= 3 or not all(
        1 <= size <= limit for size, limit in zip(grid, limits, strict=False)
    ):
        raise LaunchError(str(source), f"grid {grid}, allowed 1 to {limits}")
    if not 1 <= block <= MAX_THREADS:
        raise LaunchError(str(source), f"a block of {block} threads, allowed 1 to 1024")
    shared = shared_bytes + kernel.static_end - kernel.static_begin
    limit = SHARED_LIMITS[arch]
    if not 0 <= shared_bytes or shared > limit:
        raise LaunchError(str(source), f"{shared} bytes of shared memory, allowed {limit}")


def pack_arguments(
    source: KernelSource,
    signature: str,
    args: tuple[Arg, ...],
    is_device_pointer: Callable[[int], bool],
) -> list[Packed]:
    """What the parameters get; LaunchError where number, type or a pointer does not fit."""
    if len(args) != len(signature):
        raise LaunchError(
            str(source), f"{len(args)} arguments for {len(signature)} parameters ({signature})"
        )
    packed: list[Packed] = []
    for position, (code, arg) in enumerate(zip(signature, args, strict=True)):
        if code in "pl" and type(arg) is int:
            if code == "p" and arg and not is_device_pointer(arg):
                raise LaunchError(
                    str(source), f"argument {position}, {arg:#x}, is no device pointer"
                )
            packed.append(ctypes.c_uint64(arg & (2**64 - 1)))
        elif code == "i" and isinstance(arg, np.int32):
            packed.append(ctypes.c_int32(int(arg)))
        elif code == "f" and isinstance(arg, np.float32):
            packed.append(ctypes.c_float(float(arg)))
        elif code == "T" and isinstance(arg, TensorMap):
            rows, columns = arg.shape
            stride = arg.row_stride_bytes
            packed.append(_MapFields(MAP_MAGIC, arg.address, rows, columns, stride, *arg.box))
        else:
            raise LaunchError(
                str(source),
                f"argument {position} is a {type(arg).__name__}, the parameter takes "
                f"{_PARAMETERS.get(code, 'something no argument can be')}",
            )
    return packed


def run(
    source: KernelSource,
    kernel: Kernel,
    grid: tuple[int, ...],
    block: int,
    arguments: list[Packed],
    shared_bytes: int,
    order: Order,
    workers: int,
    sizes: Mapping[int, int],
) -> None:
    """Run a grid to its end; LaunchError with block, thread and line. `sizes`: allocations."""
    pointers = (ctypes.c_void_p * max(1, len(arguments)))(
        *(ctypes.addressof(argument) for argument in arguments)
    )
    launch = _Launch(
        kernel.call,
        ctypes.addressof(pointers),
        kernel.static_begin,
        kernel.static_end,
        _Index(*grid),
        _Index(block, 1, 1),
        shared_bytes,
        order == "reverse",
        workers,
    )
    if load_runtime().emu_launch(ctypes.byref(launch)):
        raise LaunchError(str(source), _explain(kernel, launch, sizes))


def _explain(kernel: Kernel, launch: _Launch, sizes: Mapping[int, int]) -> str:
    text = launch.error.decode(errors="replace")
    if launch.fault_instruction:
        line = source_line(kernel.path, launch.fault_instruction - kernel.base)
        text += f" at {line}" if line else ""
    at = launch.fault_address
    for address, size in sizes.items():
        if address - 4096 <= at < address + size + 4096 and not address <= at < address + size:
            side = f"{at - address - size} bytes past the end" if at >= address else "before"
            return f"{text}, {at:#x}: {side} of the {size} bytes at {address:#x}"
    return f"{text}, {at:#x}" if at else text
