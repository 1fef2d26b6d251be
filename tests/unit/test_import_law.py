"""The import law: which package may import which, checked on the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"skim", "modelfile", "kernels", "gateway", "drafter_svc", "target_svc"}
SERVICES = {"gateway", "drafter_svc", "target_svc"}
LAW: dict[str, set[str]] = {  # package: what it must never import
    "skim": (OURS - {"skim"}) | {"cuda", "llama_cpp", "numpy"},
    "modelfile": SERVICES | {"kernels", "cuda", "llama_cpp"},
    "kernels": (OURS - {"kernels"}) | {"grpc", "llama_cpp"},
    "gateway": (OURS - {"skim", "gateway"}) | {"cuda", "llama_cpp", "numpy"},
    "drafter_svc": (SERVICES - {"drafter_svc"}) | {"cuda", "llama_cpp"},
    "target_svc": (SERVICES - {"target_svc"}) | {"cuda"},
}
CUDA_HOMES = {  # modules of kernels/
    "compiler",
    "cuda_calls",
    "cuda_copies",
    "cuda_device",
    "cuda_legacy",
    "cuda_memory",
    "cuda_physical",
    "gemm",
    "window",
}
LLAMA_HOME = "target_svc/llama"  # the only place that imports llama_cpp


def imported_packages(source: str) -> set[str]:
    """Top-level names that a source file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(LAW))
def test_package_keeps_the_import_law(package: str) -> None:
    breaches = []
    for path in sorted((ROOT / package).rglob("*.py")):
        found = imported_packages(path.read_text(encoding="utf-8")) & LAW[package]
        breaches += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(found)]
    assert not breaches, "\n".join(breaches)


def test_only_the_engine_child_imports_llama_cpp() -> None:
    outside = [
        str(path.relative_to(ROOT))
        for package in sorted(OURS)
        for path in sorted((ROOT / package).rglob("*.py"))
        if "llama_cpp" in imported_packages(path.read_text(encoding="utf-8"))
        and not str(path.relative_to(ROOT)).startswith(LLAMA_HOME)
    ]
    assert outside == []


def test_only_the_device_and_what_it_is_made_of_import_cuda() -> None:
    importers = {
        path.stem
        for package in sorted(OURS)
        for path in sorted((ROOT / package).rglob("*.py"))
        if imported_packages(path.read_text(encoding="utf-8")) & {"cuda", "nvmath"}
    }
    assert importers <= CUDA_HOMES


def test_engine_child_is_imported_by_no_other_module() -> None:
    importers = []
    for package in sorted(OURS):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            text = path.read_text(encoding="utf-8")
            if "target_svc.llama" in text and not name.startswith(LLAMA_HOME):
                tree = ast.parse(text)
                modules = [
                    node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                ]
                if any(module.startswith("target_svc.llama") for module in modules):
                    importers.append(name)
    assert importers == []


def test_law_sees_imports_inside_functions() -> None:
    assert imported_packages("def f():\n    import cuda.core\n    from numpy import x\n") == {
        "cuda",
        "numpy",
    }
