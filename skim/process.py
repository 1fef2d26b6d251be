"""How a service's process starts and ends: `run_service`, which each service's `__main__` calls.

Reads the command line and the settings, sets the log up, serves. A setting, a model or a port that
cannot be used is one line on standard error and exit status 2; a service that fails later on, for
good, is one line and status 1, so that a supervisor starts it anew.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from skim.config import ServiceSettings
from skim.errors import ConfigError, ModelFileError, SkimError
from skim.log import configure, get_logger

S = TypeVar("S", bound=ServiceSettings)


def run_service(
    package: str,
    about: str | None,
    settings_type: type[S],
    serve: Callable[[S], Coroutine[Any, Any, None]],
) -> int:
    """Run one service until it is told to stop.

    Args:
        package: name under which `python -m` finds it.
        about: what `--help` says.
        settings_type: its settings; those with a `model` can be given one on the command line.
        serve: serves until told to stop; raises the tree of `skim.errors`.
    Returns:
        the process's exit status.
    """
    name = settings_type.table
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=about)
    parser.add_argument("--config", type=Path, help=f"TOML file with a [{name}] table")
    if "model" in settings_type.model_fields:
        parser.add_argument(
            "--model", type=Path, help=f"GGUF file; beats SKIM_{name.upper()}_MODEL"
        )
    overrides = vars(parser.parse_args())
    try:
        settings = settings_type.load(file=overrides.pop("config"), overrides=overrides)
        configure(name, settings.log_level, pretty=settings.log_pretty)
        get_logger().info("starting", **settings.describe())
        asyncio.run(serve(settings))
    except SkimError as error:
        print(f"{name}: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | ModelFileError) else 1
    return 0
