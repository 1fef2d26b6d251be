"""Every kernel compiles for every architecture, without a GPU; the compiler's errors and cache."""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kernels.device import KernelSource
from kernels.errors import CompileError, InvalidArgument
from kernels.specialisation import ARCHS, Family, families
from tests.tools import require_package

if TYPE_CHECKING:
    from kernels.compiler import Report

SOURCES = Path(__file__).resolve().parents[2] / "kernels/cuda"
Unit = tuple[str, tuple[tuple[str, int | str], ...], str]  # file, defines, architecture

DOUBLE = """\
#include "shared.cuh"
extern "C" __global__ void double_all(float* values, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) values[i] *= FACTOR;
}
"""
SPILLING = """\
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* p, int n) {
    __shared__ float kept[96];
    float r[128];
    #pragma unroll
    for (int i = 0; i < 128; ++i) r[i] = p[i * n + threadIdx.x];
    kept[threadIdx.x % 96] = r[0];
    __syncthreads();
    #pragma unroll 1
    for (int j = 0; j < n; ++j) {
        #pragma unroll
        for (int i = 0; i < 128; ++i) r[i] = r[i] * r[(i + 37) % 128] + kept[j % 96];
    }
    #pragma unroll
    for (int i = 0; i < 128; ++i) p[i * n + threadIdx.x] = r[i];
}
"""


SERIAL = """\
extern "C" __global__ void serial(float* out, unsigned long long a, unsigned long long b) {
    float d[4] = {out[0], out[1], out[2], out[3]};
    for (int i = 0; i < 2; ++i) {
        asm volatile("wgmma.fence.sync.aligned;");
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
        d[0] += 1;  // touched before the group is waited for
        asm volatile("wgmma.commit_group.sync.aligned;");
        asm volatile("wgmma.wait_group.sync.aligned 0;");
    }
    for (int i = 0; i < 4; ++i) out[i] = d[i];
}
"""


def units() -> dict[Unit, list[Family]]:
    """What must compile, once for all entries of a file, and the families that ask for it."""
    wanted: dict[Unit, list[Family]] = defaultdict(list)
    for family in families():
        for source in family.sources():
            for arch in family.archs:
                wanted[source.file, source.defines, arch].append(family)
    return wanted


UNITS = units()


def _label(unit: Unit) -> str:
    file, defines, arch = unit
    return f"{KernelSource(file, file, defines)}-{arch}"


def _report(unit: Unit) -> Report:
    from kernels.compiler import Compiler

    file, defines, arch = unit
    return Compiler().report(KernelSource(file, "every entry", defines), arch)


@pytest.fixture(scope="module")
def reports() -> Iterator[dict[Unit, Future[Report]]]:
    """All units in processes, since NVRTC compiles one at a time in each."""
    require_package("cuda.core", "nvidia-cuda-nvrtc")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield {unit: pool.submit(_report, unit) for unit in UNITS}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("unit", UNITS, ids=_label)
def test_kernel_compiles_without_spills_or_lost_speed(
    unit: Unit, reports: dict[Unit, Future[Report]]
) -> None:
    _, found, remarks = reports[unit].result()
    assert {family.entry for family in UNITS[unit]} <= set(found)
    assert {name: used for name, used in found.items() if used.spill_store_bytes} == {}
    assert remarks == ()


def test_every_cuda_file_has_a_family() -> None:
    assert {path.name for path in SOURCES.glob("*.cu")} == {file for file, _, _ in UNITS}


@pytest.mark.timeout(600)
def test_every_entry_has_a_family(reports: dict[Unit, Future[Report]]) -> None:
    stated: dict[str, set[str]] = defaultdict(set)
    for (file, _, _), asking in UNITS.items():
        stated[file] |= {family.entry for family in asking}
    for unit, report in reports.items():
        assert set(report.result().resources) <= stated[unit[0]], unit


def test_variants_name_known_architectures() -> None:
    assert {arch for _, _, arch in UNITS} <= set(ARCHS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    require_package("cuda.core", "nvidia-cuda-nvrtc")
    sources = tmp_path / "cuda"
    sources.mkdir()
    (sources / "double.cu").write_text(DOUBLE)
    (sources / "shared.cuh").write_text("#define FACTOR 2.0f\n")
    return sources


def _double(folder: Path, arch: str = "sm_80") -> bytes:
    from kernels.compiler import Compiler

    compiler = Compiler(folder.parent / "cache", folder)
    return compiler.cubin(KernelSource("double.cu", "double_all"), arch)


def _entries(folder: Path) -> int:
    return sum(path.is_file() for path in (folder.parent / "cache/entries").rglob("*"))


def test_cubin_is_an_elf_image_and_is_kept(folder: Path) -> None:
    first = _double(folder)
    assert first.startswith(b"\x7fELF")
    assert _double(folder) == first
    assert _entries(folder) == 1


def test_changed_header_is_compiled_anew(folder: Path) -> None:
    first = _double(folder)
    (folder / "shared.cuh").write_text("#define FACTOR 3.0f\n")
    assert _double(folder) != first
    assert _entries(folder) == 2


def test_architectures_are_kept_apart(folder: Path) -> None:
    assert _double(folder, "sm_80") != _double(folder, "sm_90a")
    assert _entries(folder) == 2


def test_unwritable_cache_folder_only_costs_the_cache(folder: Path) -> None:
    (folder.parent / "cache").write_text("a file where the folder should be")
    assert _double(folder).startswith(b"\x7fELF")


def test_cache_entry_that_can_be_neither_read_nor_written_only_costs_the_cache(
    folder: Path,
) -> None:
    first = _double(folder)
    [kept] = (path for path in (folder.parent / "cache/entries").rglob("*") if path.is_file())
    kept.unlink()
    kept.mkdir()  # a folder: reading it and replacing it by a file both fail, for root too
    assert _double(folder) == first


def test_error_names_file_line_kernel_and_architecture(folder: Path) -> None:
    (folder / "double.cu").write_text(DOUBLE.replace("FACTOR", "UNKNOWN_NAME"))
    with pytest.raises(CompileError) as caught:
        _double(folder)
    assert caught.value.kernel == "double_all" and caught.value.arch == "sm_80"
    assert 'double.cu(4): error: identifier "UNKNOWN_NAME" is undefined' in caught.value.log


def test_define_reaches_the_source(folder: Path) -> None:
    from kernels.compiler import Compiler

    (folder / "shared.cuh").write_text("")
    source = KernelSource("double.cu", "double_all", (("FACTOR", 4),))
    assert Compiler(folder.parent / "cache", folder).cubin(source, "sm_80")


@pytest.mark.parametrize("file", ["missing.cu", "../double.cu"])
def test_file_outside_the_folder_is_refused(folder: Path, file: str) -> None:
    from kernels.compiler import Compiler

    with pytest.raises(InvalidArgument, match=r"one of double\.cu"):
        Compiler(folder.parent / "cache", folder).cubin(KernelSource(file, "x"), "sm_80")


def test_report_tells_registers_spills_and_shared_memory(folder: Path) -> None:
    from kernels.compiler import Compiler

    (folder / "spilling.cu").write_text(SPILLING)
    compiler = Compiler(folder.parent / "cache", folder)
    used = compiler.report(KernelSource("spilling.cu", "spilling"), "sm_80").resources["spilling"]
    assert used.registers == 32  # 65,536 of a multiprocessor over 2 x 1,024 threads
    assert used.shared_bytes == 96 * 4
    assert used.spill_store_bytes > 0 and used.spill_load_bytes > 0
    calm = compiler.report(KernelSource("double.cu", "double_all"), "sm_80").resources["double_all"]
    assert calm.spill_store_bytes == calm.stack_bytes == calm.shared_bytes == 0


def test_report_tells_that_wgmma_was_made_serial(folder: Path) -> None:
    from kernels.compiler import Compiler

    (folder / "serial.cu").write_text(SERIAL)
    compiler = Compiler(folder.parent / "cache", folder)
    remarks = compiler.report(KernelSource("serial.cu", "serial"), "sm_90a").remarks
    assert any("wgmma" in remark for remark in remarks)
