"""The target's settings of the memory plane."""

from __future__ import annotations

from pathlib import Path

import pytest

from skim.errors import ConfigError
from target_svc.config import TargetSettings
from target_svc.memory.policy import Rules
from target_svc.memory.settings import MemorySettings


def test_a_target_s_memory_plane_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "MODEL": "/models/target.gguf",
        "MEMORY_SOCKET": "/run/skim/memory.sock",
        "PARK_POLICY": "always",
        "GPU_MEMORY_BUDGET_BYTES": "25769803776",
        "MIN_RESIDENT_S": "0.5",
        "PARK_TIMEOUT_S": "3",
        "MEMORY_PEER_UIDS": "[1000, 1001]",
    }.items():
        monkeypatch.setenv(f"SKIM_TARGET_{name}", value)
    memory = TargetSettings.load().memory()
    assert memory == MemorySettings(
        Path("/run/skim/memory.sock"),
        Rules("always", min_resident_s=0.5),
        budget_bytes=24 << 30,
        park_timeout_s=3.0,
        peer_uids=(1000, 1001),
    )


def test_a_target_without_a_memory_socket_has_no_memory_plane() -> None:
    assert TargetSettings(model=Path("target.gguf")).memory() is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("park_policy", "sometimes"),
        ("park_timeout_s", 0.0),
        ("park_timeout_s", 61.0),
        ("min_resident_s", -1.0),
        ("gpu_memory_budget_bytes", -1),
    ],
)
def test_a_memory_setting_out_of_range_is_refused(setting: str, value: object) -> None:
    overrides = {"model": "target.gguf", setting: value}
    with pytest.raises(ConfigError, match=setting):
        TargetSettings.load(overrides=overrides)
