"""Structured logs: one JSON line an event, with the service's name and the request's id.

Every process calls `configure` once. Events carry ids, counts and seconds; never prompt text,
answers, tokens or secrets.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from skim.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")


def configure(service: str, level: str = "info", *, pretty: bool = False) -> None:
    """Set the process up to log to standard error.

    Args:
        service: `gateway`, `drafter` or `target`; stands in every line.
        level: one of `LEVELS`.
        pretty: people-readable lines instead of JSON, for a terminal.
    """
    if level not in LEVELS:
        raise ConfigError(
            f"log level must be one of {', '.join(LEVELS)}, got {level!r}",
            got=level,
            allowed=", ".join(LEVELS),
        )
    render: Any = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if pretty
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(service=service)


def get_logger() -> Any:
    """The process's logger: `get_logger().info("event_name", request_id=..., score_s=...)`."""
    return structlog.get_logger()
