"""Settings of the gateway: prefix `SKIM_GATEWAY_`, table `[gateway]`.

Read once in `__main__`, printed once, passed down. Refuses unknown names, values out of range and
drafter lists that name one twice, before a socket is bound.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from skim.config import ServiceSettings, settings_config
from skim.errors import ConfigError

DRAFTER = re.compile(r"([A-Za-z0-9._-]{1,64})=(\S+)")


class GatewaySettings(ServiceSettings):
    """Settings of one gateway. Sizes in bytes or tokens, times in seconds, as the names say."""

    table: ClassVar[str] = "gateway"
    model_config = settings_config("SKIM_GATEWAY_")

    # Address of GatewayService, health and reflection.
    listen: str = "127.0.0.1:50051"
    # Address of AdminService: loopback, since it can stop the service.
    admin_listen: str = "127.0.0.1:50061"
    # Address of the target.
    target: str = Field(default="127.0.0.1:50053", min_length=1)
    # Drafters as `name=address`, separated by commas; the first is the default. Empty: none, so
    # every prompt is prefilled whole.
    drafters: str = "default=127.0.0.1:50052"
    # Bearer token that callers must send; unset: none is asked for.
    token: SecretStr | None = None
    # File that holds the token, for secrets that are mounted. Excludes `token`.
    token_file: Path | None = None

    # Requests at the same time; one more is refused with RESOURCE_EXHAUSTED.
    max_requests: int = Field(default=64, ge=1, le=65_536)
    # Prompt bytes held at the same time, all requests together.
    max_prompt_bytes_in_flight: int = Field(default=256 << 20, ge=1, le=64 << 30)
    # Largest prompt. The services behind may take less and say so.
    prompt_max_bytes: int = Field(default=64 << 20, ge=1, le=(1 << 32) - 1)

    # Prompts of fewer target tokens are prefilled whole: skimming would not pay.
    skim_min_tokens: int = Field(default=4_096, ge=0, le=1 << 20)
    # How long a drafter may run one request; unset: a quarter of the full prefill that the
    # target's measured rate predicts, at least 2 s.
    score_timeout_s: float | None = Field(default=None, gt=0.0, le=86_400.0)
    # How long a drafter may refuse to take the next part before it is given up.
    drafter_stall_s: float = Field(default=5.0, gt=0.0, le=3_600.0)
    # How long a caller may leave us without its next message.
    idle_timeout_s: float = Field(default=120.0, gt=0.0, le=86_400.0)
    # The longest request, for callers that set no deadline.
    request_max_s: float = Field(default=3_600.0, gt=0.0, le=604_800.0)

    # How often the services behind are asked for their health, beside being watched.
    health_interval_s: float = Field(default=2.0, gt=0.0, le=3_600.0)

    @field_validator("drafters")
    @classmethod
    def _drafters_are_readable(cls, value: str) -> str:
        names = [name for name, _ in _parse_drafters(value)]
        if len(set(names)) != len(names):
            raise ValueError("a drafter is named twice")
        return value

    def drafter_addresses(self) -> list[tuple[str, str]]:
        """Name and address of each drafter, the default first."""
        return _parse_drafters(self.drafters)

    def bearer_token(self) -> str | None:
        """The token that callers must send, or None.

        Raises:
            ConfigError: both kinds are set, the file cannot be read, or the token is empty.
        """
        if self.token is not None and self.token_file is not None:
            raise ConfigError("token and token_file exclude each other: set one of them")
        token = self.token.get_secret_value() if self.token else None
        if self.token_file is not None:
            try:
                token = self.token_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"token file {self.token_file}: {error}") from None
        if token == "":
            raise ConfigError("the token must not be empty", allowed="at least 1 character")
        return token


def _parse_drafters(value: str) -> list[tuple[str, str]]:
    pairs = []
    for item in value.split(","):
        if not item.strip():
            continue
        match = DRAFTER.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"{item.strip()!r} is not name=host:port")
        pairs.append((match[1], match[2]))
    return pairs
