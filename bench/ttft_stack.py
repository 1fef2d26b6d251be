"""The system that `bench.ttft` measures: models, ballast, and the three services as processes.

The services are the product's own, started by the product's own supervisor; the drafter's entry
point is `bench.planted_drafter`. What a request's stages took in the drafter is read back from its
log. Refuses a memory plane that this build does not have.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from bench import random_model, random_target
from bench.planted_drafter import DensityFile
from bench.vocabulary import learn
from drafter_svc.config import DrafterSettings
from skim.cli.service_process import Status
from skim.cli.stack import LocalStack
from skim.cli.stack_plan import StackOptions, plan_stack
from skim.client import Client
from skim.errors import ConfigError, SkimError
from skim.rpc import CHANNEL_OPTIONS
from skim.rpc_errors import from_rpc_error
from skim.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    memory_pb2,
    memory_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
)
from target_svc.config import TargetSettings

CALL_TIMEOUT_S = 10.0
START_TIMEOUT_S = 120.0
BALLAST_TIMEOUT_S = 60.0
RESTART_TIMEOUT_S = 30.0
MEMORY_SOCKETS = ("SKIM_TARGET_MEMORY_SOCKET", "SKIM_DRAFTER_MEMORY_SOCKET")


@dataclass(frozen=True)
class Models:
    """Where the two model files lie, and how long writing them took (0: they were there)."""

    target: Path
    drafter: Path
    target_s: float
    drafter_s: float


def write_models(folder: Path, *, small: bool) -> Models:
    """Write the models that an earlier run did not leave; of two runs at once one waits."""
    folder.mkdir(parents=True, exist_ok=True)
    target_shape, drafter_shape = ("small", "small") if small else ("27b", "qwen3-0.6b")
    paths = folder / f"target-{target_shape}.gguf", folder / f"drafter-{drafter_shape}.gguf"
    spent = [0.0, 0.0]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if all(path.exists() for path in paths):
            return Models(*paths, *spent)
        vocabulary = learn()
        for index, path in enumerate(paths):
            begin_s, part = time.monotonic(), path.with_suffix(".part")
            if index == 0:
                shape = random_target.SHAPES[target_shape]
                random_target.write_random_target(part, shape, vocabulary)
            else:
                random_model.write_random_gguf(
                    part, random_model.SHAPES[drafter_shape], vocabulary=vocabulary
                )
            part.replace(path)
            spent[index] = time.monotonic() - begin_s
    return Models(*paths, *spent)


def has_memory_plane() -> bool:
    """Whether this build's services can share a GPU's memory."""
    return all(
        "memory_socket" in settings.model_fields for settings in (TargetSettings, DrafterSettings)
    )


class Ballast:
    """A process that holds the GPU's memory but for so many GiB; a context manager."""

    def __init__(self, leave_gib: float) -> None:
        command = [sys.executable, "-m", "bench.ballast", "--leave-gib", str(leave_gib)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"the ballast ended with status {self._process.wait()}")
        self.report: dict[str, int] = json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate("", timeout=BALLAST_TIMEOUT_S)


class Stack:
    """The three services over two models, ready to be asked; a context manager.

    Args:
        models: to serve.
        environment: settings of the services, beside those that the benchmark needs.
        park_policy: of the memory plane; None: no memory plane, the drafter holds its weights.
        drafter_settings: numbers of the drafter's own table, which `restart_drafter` may replace;
            None: there is no such table.
    Attributes:
        client: to the gateway.
        density: what the drafter's next pass attends to.
    Raises:
        ConfigError: a memory plane is asked for and this build has none.
    """

    def __init__(
        self,
        models: Models,
        environment: Mapping[str, str],
        *,
        park_policy: str | None,
        drafter_settings: Mapping[str, float] | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="skim-ttft-"))
        self._table = self._folder / "drafter.toml"
        arguments: tuple[str, ...] = ("--density-file", str(self._folder / "density"))
        if drafter_settings is not None:
            self._write_table(drafter_settings)
            arguments += ("--config", str(self._table))
        self.density = DensityFile(self._folder / "density")
        given = dict(environment)
        if park_policy is not None:
            if not has_memory_plane():
                raise ConfigError("this build has no memory plane", got=park_policy)
            given |= dict.fromkeys(MEMORY_SOCKETS, str(self._folder / "memory.sock"))
            given["SKIM_TARGET_PARK_POLICY"] = park_policy
        options = StackOptions(
            target=models.target,
            drafters=(models.drafter,),
            base_port=0,
            log_dir=self._folder,
            grace_s=2.0,
            start_timeout_s=START_TIMEOUT_S,
            environment=given,
        )
        plans = [
            replace(
                plan,
                module="bench.planted_drafter",
                arguments=(*plan.arguments, *arguments),
            )
            if plan.name == "drafter"
            else plan
            for plan in plan_stack(options)
        ]
        self._stack = LocalStack(options, plans=plans)
        self._log = next(plan.log_path for plan in plans if plan.name == "drafter")
        self.start_s = 0.0

    def __enter__(self) -> Self:
        begin_s = time.monotonic()
        self._stack.start()
        self.start_s = time.monotonic() - begin_s
        self.client = Client(self._stack.gateway_address, deadline_s=600.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()
        self._stack.stop()

    @property
    def log_dir(self) -> str:
        """Folder of the services' logs; they stay."""
        return self._stack.log_dir

    def address(self, service: str) -> str:
        """`host:port` of a service's own door."""
        return self._stack.address(service)

    def restart_drafter(self, settings: Mapping[str, float]) -> float:
        """Kill the drafter and wait for its successor with other settings; seconds it took.

        Raises:
            DeadlineExceeded: it does not serve again.
        """
        begin_s = time.monotonic()
        self._write_table(settings)
        (before,) = (state.restarts for state in self._stack.states() if state.name == "drafter")
        self._stack.kill("drafter")
        self._stack.wait_for(
            "drafter", Status.READY, restarts=before + 1, timeout_s=RESTART_TIMEOUT_S
        )
        return time.monotonic() - begin_s

    def _write_table(self, settings: Mapping[str, float]) -> None:
        lines = ["[drafter]", *(f"{name} = {value}" for name, value in settings.items())]
        self._table.write_text("\n".join(lines) + "\n", encoding="ascii")

    def trouble(self) -> list[str]:
        """What is wrong with the services: crashes since the start, one that does not serve."""
        return [
            f"{state.name}: {state.status}, {state.restarts} restarts, {state.detail}"
            for state in self._stack.states()
            if state.restarts or state.status is not Status.READY
        ]

    def scored(self, request_id: str) -> dict[str, Any] | None:
        """The drafter's own account of a request; None: it did not score it."""
        for line in reversed(self._log.read_text(encoding="utf-8").splitlines()):
            if request_id in line and line.startswith("{"):
                event: dict[str, Any] = json.loads(line)
                if event.get("event") == "scored" and event.get("request_id") == request_id:
                    return event
        return None

    def facts(self) -> dict[str, Any]:
        """What the services say of themselves."""
        drafter = self._ask("drafter", drafter_pb2_grpc.DrafterServiceStub, "GetDrafter")
        target = self._ask("target", target_pb2_grpc.TargetServiceStub, "GetTarget")
        return {
            "drafter_backend": drafter.backend,
            "target_full_max_tokens": target.full_max_tokens,
            "target_prefill_tokens_per_s": round(target.prefill_tokens_per_s),
        }

    def regions(self) -> list[dict[str, Any]]:
        """The drafters' weights as the landlord sees them; none without a memory plane."""
        try:
            found = self._ask("target", memory_pb2_grpc.MemoryServiceStub, "ListRegions")
        except SkimError:
            return []
        return [
            {
                "name": region.name,
                "state": drafter_pb2.ResidencyState.Name(region.state).removeprefix(
                    "RESIDENCY_STATE_"
                ),
                "generation": region.generation,
                "size_bytes": region.size_bytes,
            }
            for region in found.regions
        ]

    def _ask(self, service: str, stub: Any, method: str) -> Any:
        requests = {
            "GetDrafter": drafter_pb2.GetDrafterRequest,
            "GetTarget": target_pb2.GetTargetRequest,
            "ListRegions": memory_pb2.ListRegionsRequest,
        }
        address = self._stack.address(service, admin=method == "ListRegions")
        with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            try:
                return getattr(stub(channel), method)(requests[method](), timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as failure:
                raise from_rpc_error(failure) from failure
