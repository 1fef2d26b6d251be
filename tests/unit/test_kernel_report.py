"""The table of the kernels' resources: a line a kernel, a column an architecture."""

from __future__ import annotations

import pytest

from tests.tools import require_package


def test_table_shows_spills_stack_and_missing_architectures() -> None:
    require_package("cuda.core", "nvidia-cuda-nvrtc")
    from bench.kernel_report import Row, table
    from kernels.compiler import Resources

    rows = [
        Row("k[D=64]", "sm_80", Resources(40, 0, 0, 0, 1024), 9_000, ()),
        Row("k[D=64]", "sm_90a", Resources(64, 16, 4, 8, 0), 9_000, ()),
        Row("other", "sm_90a", Resources(168, 0, 0, 0, 0), 9_000, ()),
    ]
    assert list(table(rows, ("sm_80", "sm_90a")))[2:] == [
        "| k[D=64] | 40 | 64 spills 12 stack 16 | 1024 |",
        "| other | — | 168 | 0 |",
    ]


def test_units_compile_a_file_once_for_all_of_its_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    require_package("cuda.core", "nvidia-cuda-nvrtc")
    from bench import kernel_report
    from kernels.specialisation import Family

    made = (Family("f.cu", "a", D=(64,)), Family("f.cu", "b", D=(64,)), Family("g.cu", "c"))
    monkeypatch.setattr(kernel_report, "families", lambda: made)
    found = kernel_report.units(("sm_80",))
    assert [(source.file, entries) for source, _, entries in found] == [
        ("f.cu", ("a", "b")),
        ("g.cu", ("c",)),
    ]
