"""What the local stack runs: one plan a service, from options, environment, file and defaults.

Pure but for reading the settings file and looking for free ports. The stack sets only what the
services must agree on (addresses and model files); everything else stays with each service's own
settings. Precedence as there: options, environment, file, defaults.
"""

from __future__ import annotations

import os
import tempfile
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skim.cli.bundled import CROSS_DRAFTER, DRAFTER, TARGET, bundled_model, check_model_path
from skim.cli.ports import DEFAULT_BASE_PORT, free_ports, plan_ports
from skim.errors import ConfigError

# Settings that the port option decides, where it is given.
ADDRESSES = ("listen", "admin_listen", "target", "drafters")
KEPT_RUNS = 20  # log folders of earlier runs that are left in the default place


@dataclass(frozen=True)
class StackOptions:
    """What the caller of a local stack decides; None and empty mean: environment, file, default."""

    # GGUF of the target; None: the bundled one.
    target: Path | None = None
    # GGUFs of the drafters, the default first; empty: the bundled one.
    drafters: tuple[Path, ...] = ()
    # TOML file that every service reads its table from.
    settings: Path | None = None
    # Port of the gateway; drafter and target follow, admin ports lie ten above. 0: free ports.
    base_port: int | None = None
    # Folder for one log file a service; None: a new one under the user's state folder.
    log_dir: Path | None = None
    # Seconds that running requests get when the stack stops.
    grace_s: float = 30.0
    # Seconds for a service to load its model and become ready.
    start_timeout_s: float = 600.0
    # More environment variables for every service.
    environment: Mapping[str, str] = field(default_factory=dict)
    # Whether target and drafters share a GPU's memory where that works (`shared_gpu`).
    share_gpu: bool = True


@dataclass(frozen=True)
class ServicePlan:
    """One service process: its name, module, addresses, what it is told, and where it logs."""

    name: str
    module: str
    address: str
    admin_address: str
    environment: Mapping[str, str]
    arguments: tuple[str, ...]
    log_path: Path


def plan_stack(options: StackOptions) -> tuple[ServicePlan, ...]:
    """Plan the services in the order in which they start: target, drafters, gateway.

    Raises:
        ConfigError: the settings file cannot be read, or the ports make no sense.
        ModelFileError: a model path is no GGUF.
        PreconditionFailed: a bundled model is needed and missing.
    """
    lookup = Lookup(options)
    ports = plan_ports(DEFAULT_BASE_PORT if options.base_port is None else options.base_port)
    log_dir = options.log_dir or new_log_dir()
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"log folder {log_dir}: {error.strerror}", field="log_dir") from None
    arguments = ("--config", str(options.settings.resolve())) if options.settings else ()

    def plan(name: str, table: str, module: str, found: dict[str, str]) -> ServicePlan:
        environment = {**options.environment}
        for key, value in found.items():
            environment[f"SKIM_{table.upper()}_{key.upper()}"] = value
        address, admin = found["listen"], found["admin_listen"]
        log_path = log_dir / f"{name}.log"
        return ServicePlan(name, module, address, admin, environment, arguments, log_path)

    target = {"model": str(_target_model(options, lookup))}
    target |= lookup.listen("target", ports["target"])
    plans = [plan("target", "target", "target_svc", target)]
    models = _drafter_models(options, lookup)
    scorers: dict[str, str] = {}
    for name in list(models)[: len(options.drafters) or 1]:
        listen = lookup.listen("drafter", ports["drafter"]) if not scorers else _anywhere()
        others = {other: str(path) for other, path in models.items() if other != name}
        drafter = {"model": str(models[name]), "name": name, **listen}
        drafter["models"] = lookup.get("drafter", "models") or _pairs(others)
        process = f"drafter-{len(scorers) + 1}" if scorers else "drafter"
        plans.append(plan(process, "drafter", "drafter_svc", drafter))
        scorers[name] = listen["listen"]
    gateway = lookup.listen("gateway", ports["gateway"])
    gateway["target"] = lookup.get("gateway", "target") or target["listen"]
    gateway["drafters"] = lookup.get("gateway", "drafters") or _pairs(scorers)
    plans.append(plan("gateway", "gateway", "gateway", gateway))
    return tuple(plans)


def new_log_dir() -> Path:
    """A new folder for this run's logs; folders of old runs beside it are removed."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    runs = Path(state) / "skim/runs"
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        (runs / name).mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to, as in a container
        return Path(tempfile.mkdtemp(prefix="skim-run-"))
    for old in sorted(path for path in runs.iterdir() if path.is_dir())[:-KEPT_RUNS]:
        _remove_run(old)
    return runs / name


class Lookup:
    """Settings that the environment or the file give, unless the options rule them out."""

    def __init__(self, options: StackOptions) -> None:
        self._fixed_ports = options.base_port is not None
        self._environment = {**os.environ, **options.environment}
        self._file = _read_tables(options.settings)

    def get(self, table: str, key: str) -> str | None:
        """Value of a setting, or None when the options or the defaults decide."""
        if self._fixed_ports and key in ADDRESSES:
            return None
        value = self._environment.get(f"SKIM_{table.upper()}_{key.upper()}")
        return value if value is not None else self._from_file(table, key)

    def listen(self, table: str, ports: tuple[int, int]) -> dict[str, str]:
        """Both addresses of a service."""
        keys = dict(zip(("listen", "admin_listen"), ports, strict=True))
        return {k: self.get(table, k) or f"127.0.0.1:{port}" for k, port in keys.items()}

    def _from_file(self, table: str, key: str) -> str | None:
        value = self._file.get(table, {}).get(key)
        return None if value is None else str(value)


def _read_tables(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"settings file {file}: {error.strerror}", field="settings", got=str(file)
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {file}: {error}", field="settings") from None
    return {name: table for name, table in tables.items() if isinstance(table, dict)}


def _target_model(options: StackOptions, lookup: Lookup) -> Path:
    path = options.target or lookup.get("target", "model") or bundled_model(TARGET)
    return check_model_path(Path(path), "target")


def _anywhere() -> dict[str, str]:
    data, admin = free_ports(2)
    return {"listen": f"127.0.0.1:{data}", "admin_listen": f"127.0.0.1:{admin}"}


def _drafter_models(options: StackOptions, lookup: Lookup) -> dict[str, Path]:
    """Drafter models by name, the default first: those given, or the one set, or the bundled."""
    found: dict[str, Path] = {}
    for given in options.drafters:
        found[_unused(given.stem, found)] = check_model_path(given, "drafter")
    if not found and (path := lookup.get("drafter", "model")):
        found[_unused(Path(path).stem, found)] = check_model_path(Path(path), "drafter")
    if not found:
        for bundled in (bundled_model(DRAFTER), bundled_model(CROSS_DRAFTER)):
            found[bundled.stem] = bundled
    return found


def _pairs(values: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())


def _unused(stem: str, names: Mapping[str, Path]) -> str:
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem)[:60]
    return clean if clean not in names else f"{clean}-{len(names) + 1}"


def _remove_run(folder: Path) -> None:
    for file in folder.glob("*.log"):
        file.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        return  # somebody keeps something of their own in it
