"""The gateway's settings: drafters, tokens, and what never shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.config import GatewaySettings
from skim.errors import ConfigError


def test_drafters_are_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIM_GATEWAY_DRAFTERS", "small=localhost:1, big=unix:/run/big.sock")
    assert GatewaySettings.load().drafter_addresses() == [
        ("small", "localhost:1"),
        ("big", "unix:/run/big.sock"),
    ]


def test_no_drafters_are_allowed() -> None:
    assert GatewaySettings.load(overrides={"drafters": ""}).drafter_addresses() == []


@pytest.mark.parametrize(
    "drafters", ["localhost:1", "a=", "a b=x:1", "a=x:1,a=y:2", "a=x:1;b=y:2 c"]
)
def test_an_unreadable_list_of_drafters_is_refused(drafters: str) -> None:
    with pytest.raises(ConfigError, match="drafters"):
        GatewaySettings.load(overrides={"drafters": drafters})


def test_an_unknown_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIM_GATEWAY_TOKNE", "x")
    with pytest.raises(ConfigError, match="SKIM_GATEWAY_TOKNE"):
        GatewaySettings.load()


def test_the_token_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    assert GatewaySettings.load(overrides={"token_file": file}).bearer_token() == "s3cret"


def test_without_a_token_none_is_asked_for() -> None:
    assert GatewaySettings.load().bearer_token() is None


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_missing_or_empty_token_file_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError):
        GatewaySettings.load(overrides={"token_file": file}).bearer_token()


def test_two_tokens_are_refused_without_showing_them(tmp_path: Path) -> None:
    settings = GatewaySettings.load(
        overrides={"token": SecretStr("s3cret"), "token_file": tmp_path / "token"}
    )
    with pytest.raises(ConfigError) as refused:
        settings.bearer_token()
    assert "s3cret" not in str(refused.value)


def test_the_description_hides_the_token() -> None:
    settings = GatewaySettings.load(overrides={"token": "s3cret"})
    assert "s3cret" not in str(settings.describe())
    assert "s3cret" not in repr(settings)
