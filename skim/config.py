"""Settings: one frozen object a process, read once from overrides, environment and a TOML file.

Each service subclasses `ServiceSettings` with its own prefix (`SKIM_GATEWAY_`, …) and reads the
table of the same name from the file. Later sources lose: overrides, then environment, then file,
then the defaults. Refuses unknown names, so that a typo never passes for a default.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from skim.errors import ConfigError


class Settings(BaseSettings):
    """Reading, checking and showing.

    Subclasses set `table` (the TOML table) and `model_config = settings_config("SKIM_X_")`.
    """

    table: ClassVar[str] = ""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read overrides and environment only; `load` merges the file in."""
        return init_settings, EnvSettingsSource(settings_cls)

    @classmethod
    def load(cls, *, file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read the settings of this process.

        Args:
            file: TOML file with a table named `cls.table`; None: no file.
            overrides: values that beat everything, from command-line flags; None entries are unset.
        Raises:
            ConfigError: unknown name, wrong type or value out of range; names all of them.
        """
        cls._refuse_unknown_environment()
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        try:
            from_file = cls._read_table(file) if file else {}
            in_environment = EnvSettingsSource(cls)()
            return cls(**{**from_file, **in_environment, **given})
        except ValidationError as error:
            raise ConfigError(_explain(cls, error)) from None
        except SettingsError as error:
            raise ConfigError(f"{cls.table or cls.__name__} settings: {error}") from None

    @classmethod
    def _read_table(cls, file: Path) -> dict[str, Any]:
        try:
            document = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"settings file {file}: {error.strerror}", got=str(file)) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"settings file {file}: {error}", got=str(file)) from None
        known = {"gateway", "drafter", "target"}
        for name in document:
            if name not in known:
                raise ConfigError(
                    f"settings file {file}: unknown table [{name}]",
                    got=name,
                    allowed=", ".join(sorted(known)),
                )
        table = document.get(cls.table, {})
        return dict(table)

    @classmethod
    def _refuse_unknown_environment(cls) -> None:
        prefix = str(cls.model_config.get("env_prefix", "")).upper()
        known = {f"{prefix}{name.upper()}" for name in cls.model_fields}
        unknown = sorted(
            name for name in os.environ if prefix and name.startswith(prefix) and name not in known
        )
        if unknown:
            raise ConfigError(
                f"unknown settings in the environment: {', '.join(unknown)}",
                got=", ".join(unknown),
                allowed=", ".join(sorted(known)),
            )

    def describe(self) -> dict[str, str]:
        """Name and value of every setting, secrets masked, for the start-up line and GetConfig."""
        return {
            name: "(set)" if isinstance(value, SecretStr) else str(value)
            for name, value in self.model_dump().items()
        }


class ServiceSettings(Settings):
    """What every service can be told besides its own settings."""

    # Seconds that running requests get at SIGTERM.
    grace_s: float = Field(default=30.0, ge=0.0, le=3_600.0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # Lines for people instead of JSON.
    log_pretty: bool = False


def settings_config(env_prefix: str) -> SettingsConfigDict:
    """Common model configuration: frozen, unknown names refused, the given environment prefix."""
    return SettingsConfigDict(
        env_prefix=env_prefix,
        frozen=True,
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
    )


def _explain(cls: type[Settings], error: ValidationError) -> str:
    prefix = str(cls.model_config.get("env_prefix", ""))
    problems = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or "settings"
        got = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
        problems.append(f"{name} ({prefix}{name.upper()}): {problem['msg']}{got}")
    return f"{cls.table or cls.__name__} settings: " + "; ".join(problems)
