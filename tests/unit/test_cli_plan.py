"""What the local stack decides to run: ports, precedence, names, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from skim.cli.bundled import CROSS_DRAFTER, DRAFTER, TARGET, bundled_model
from skim.cli.ports import HIGHEST_BASE_PORT, free_ports, plan_ports
from skim.cli.stack_plan import ServicePlan, StackOptions, new_log_dir, plan_stack
from skim.errors import ConfigError, ModelFileError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for table in ("GATEWAY", "DRAFTER", "TARGET"):
        for key in ("LISTEN", "ADMIN_LISTEN", "MODEL", "TARGET", "DRAFTERS"):
            monkeypatch.delenv(f"SKIM_{table}_{key}", raising=False)


def plans(options: StackOptions) -> dict[str, ServicePlan]:
    return {plan.name: plan for plan in plan_stack(options)}


def test_plan_starts_target_then_drafter_then_gateway() -> None:
    assert [p.name for p in plan_stack(StackOptions())] == ["target", "drafter", "gateway"]


def test_plan_uses_the_usual_ports_and_the_bundled_pair_by_default() -> None:
    found = plans(StackOptions())
    assert found["gateway"].address == "127.0.0.1:50051"
    assert found["drafter"].admin_address == "127.0.0.1:50062"
    assert found["target"].environment["SKIM_TARGET_MODEL"] == str(bundled_model(TARGET))
    assert found["drafter"].environment["SKIM_DRAFTER_MODEL"] == str(bundled_model(DRAFTER))


def test_gateway_is_told_where_the_others_listen() -> None:
    found = plans(StackOptions(base_port=0))
    told = found["gateway"].environment
    assert told["SKIM_GATEWAY_TARGET"] == found["target"].address
    assert told["SKIM_GATEWAY_DRAFTERS"] == f"skim-drafter={found['drafter'].address}"


def test_free_ports_are_all_different() -> None:
    found = plan_stack(StackOptions(base_port=0))
    addresses = {a for p in found for a in (p.address, p.admin_address)}
    assert len(addresses) == 6


def test_second_drafter_gets_a_name_and_a_port_of_its_own() -> None:
    drafters = (bundled_model(DRAFTER), bundled_model(CROSS_DRAFTER))
    found = plans(StackOptions(base_port=0, drafters=drafters))
    assert found["gateway"].environment["SKIM_GATEWAY_DRAFTERS"] == (
        f"skim-drafter={found['drafter'].address},skim-drafter-cross={found['drafter-2'].address}"
    )


def test_settings_file_decides_where_no_option_and_no_variable_does(tmp_path: Path) -> None:
    file = tmp_path / "skim.toml"
    file.write_text('[gateway]\nlisten = "127.0.0.1:7001"\n[target]\nslots = 2\n')
    found = plans(StackOptions(settings=file))
    assert found["gateway"].address == "127.0.0.1:7001"
    assert found["target"].arguments == ("--config", str(file))


def test_environment_beats_the_settings_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "skim.toml"
    file.write_text('[target]\nlisten = "127.0.0.1:7003"\n')
    monkeypatch.setenv("SKIM_TARGET_LISTEN", "127.0.0.1:7103")
    assert plans(StackOptions(settings=file))["target"].address == "127.0.0.1:7103"


def test_port_option_beats_environment_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIM_GATEWAY_LISTEN", "127.0.0.1:7101")
    assert plans(StackOptions(base_port=7201))["gateway"].address == "127.0.0.1:7201"


def test_plan_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "no.gguf"
    with pytest.raises(ModelFileError, match=r"target .*no\.gguf: No such file"):
        plan_stack(StackOptions(target=missing))


def test_plan_refuses_a_model_without_the_gguf_magic(tmp_path: Path) -> None:
    wrong = tmp_path / "model.safetensors"
    wrong.write_bytes(b"\x80\x00\x00\x00rest")
    with pytest.raises(ModelFileError, match="is not a GGUF file"):
        plan_stack(StackOptions(drafters=(wrong,)))


def test_plan_refuses_a_settings_file_that_is_not_toml(tmp_path: Path) -> None:
    file = tmp_path / "skim.toml"
    file.write_text("[gateway\n")
    with pytest.raises(ConfigError, match="settings file"):
        plan_stack(StackOptions(settings=file))


def test_bundled_drafter_can_be_swapped_for_the_other_one() -> None:
    told = plans(StackOptions())["drafter"].environment
    assert told["SKIM_DRAFTER_MODELS"] == f"skim-drafter-cross={bundled_model(CROSS_DRAFTER)}"


def test_port_option_leaves_the_model_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIM_DRAFTER_MODEL", str(bundled_model(CROSS_DRAFTER)))
    told = plans(StackOptions(base_port=0))["drafter"].environment
    assert told["SKIM_DRAFTER_NAME"] == "skim-drafter-cross"


@pytest.mark.parametrize("base", [-1, HIGHEST_BASE_PORT + 1])
def test_base_port_without_room_for_six_ports_is_refused(base: int) -> None:
    with pytest.raises(ConfigError, match="port must be 0"):
        plan_ports(base)


def test_highest_base_port_reaches_the_last_port() -> None:
    assert max(max(pair) for pair in plan_ports(HIGHEST_BASE_PORT).values()) == 65_535


def test_free_ports_can_be_listened_on() -> None:
    import socket

    for port in free_ports(3):
        socket.create_server(("127.0.0.1", port)).close()


def test_log_folders_of_old_runs_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "state/skim/runs"
    for index in range(25):
        (runs / f"20200101-{index:06}").mkdir(parents=True)
        (runs / f"20200101-{index:06}/target.log").write_text("x")
    newest = new_log_dir()
    left = sorted(path.name for path in runs.iterdir())
    assert len(left) == 20
    assert left[-1] == newest.name
    assert left[0] == "20200101-000006"
