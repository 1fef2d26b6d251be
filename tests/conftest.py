"""What holds for all tests: their markers, and which of them are collected."""

from __future__ import annotations

import pytest

# Here and not in pyproject.toml: a machine with a GPU may run the tests without that file.
MARKERS = (
    "gpu: needs a CUDA device; run with -m gpu, and skipped with one sentence where there is none",
    "e2e: starts the real services as processes",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the emulated variants of tests that are for a GPU alone: their sizes are a GPU's."""

    def for_gpu_alone(item: pytest.Item) -> bool:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return item.get_closest_marker("gpu") is not None and "emulated" in map(str, values)

    dropped = [item for item in items if for_gpu_alone(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
