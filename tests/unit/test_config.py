"""Settings come from overrides, environment, file and defaults, in that order."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, SecretStr

from skim.config import Settings, settings_config
from skim.errors import ConfigError


class ExampleSettings(Settings):
    table: ClassVar[str] = "drafter"
    model_config = settings_config("SKIM_EXAMPLE_")
    listen: str = "127.0.0.1:1"
    keep_ratio: float = Field(default=0.1, gt=0, le=1)
    token: SecretStr | None = None


def test_override_beats_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "skim.toml"
    file.write_text('[drafter]\nlisten = "file:1"\nkeep_ratio = 0.2\n')
    assert ExampleSettings.load().keep_ratio == 0.1
    assert ExampleSettings.load(file=file).keep_ratio == 0.2
    monkeypatch.setenv("SKIM_EXAMPLE_KEEP_RATIO", "0.3")
    assert ExampleSettings.load(file=file).keep_ratio == 0.3
    loaded = ExampleSettings.load(file=file, overrides={"keep_ratio": 0.4, "listen": None})
    assert (loaded.keep_ratio, loaded.listen) == (0.4, "file:1")


def test_unknown_name_is_refused_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "skim.toml"
    file.write_text("[drafter]\nkeep = 0.2\n")
    with pytest.raises(ConfigError, match="keep"):
        ExampleSettings.load(file=file)
    file.write_text("[draftr]\nkeep_ratio = 0.2\n")
    with pytest.raises(ConfigError, match="draftr"):
        ExampleSettings.load(file=file)
    monkeypatch.setenv("SKIM_EXAMPLE_KEPP_RATIO", "0.3")
    with pytest.raises(ConfigError, match="SKIM_EXAMPLE_KEPP_RATIO"):
        ExampleSettings.load()


def test_value_out_of_range_names_setting_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIM_EXAMPLE_KEEP_RATIO", "1.5")
    with pytest.raises(ConfigError, match=r"SKIM_EXAMPLE_KEEP_RATIO.*got '1\.5'"):
        ExampleSettings.load()


def test_unreadable_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        ExampleSettings.load(file=tmp_path / "nothing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[drafter\n")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        ExampleSettings.load(file=broken)


def test_description_masks_secrets() -> None:
    described = ExampleSettings.load(overrides={"token": "hush"}).describe()
    assert described["token"] == "(set)"
    assert "hush" not in str(described)
