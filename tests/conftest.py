"""What holds for all tests: which of them are collected."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the emulated variants of tests that are for a GPU alone: their sizes are a GPU's."""

    def for_gpu_alone(item: pytest.Item) -> bool:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return item.get_closest_marker("gpu") is not None and "emulated" in map(str, values)

    dropped = [item for item in items if for_gpu_alone(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
