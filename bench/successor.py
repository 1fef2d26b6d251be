"""How soon a drafter serves again after kill -9, its weights still on the GPU or parked.

    python -m bench.successor --model-shape qwen3-0.6b --kills 3

The landlord runs here; the drafter is the product's own service in a process of its own, over a
model with random weights. The first process fills the region from the file. Then, again and again,
the drafter is killed in the stated state of its region and started anew: the landlord gives its
successor the weights that are there, and none is read from disk. A row says when, counted from the
start of the process, it logged its first line (Python and imports), had its region, had warmed its
kernels up, and had answered a Score that was asked from the start on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from bench.gpu_options import aligned, commit
from bench.random_model import SHAPES, write_random_gguf
from bench.vocabulary import learn
from kernels.ipc.physical import Physical, open_physical
from skim.cli.ports import free_ports
from skim.demo_document import build_document
from skim.log import configure
from skim.rpc import CHANNEL_OPTIONS
from skim.v1 import drafter_pb2, drafter_pb2_grpc
from skim.wire import prompt_end, split_parts
from target_svc.memory.landlord import Landlord
from target_svc.memory.settings import MemorySettings

SERVICE = "drafter_svc"
NAME = "drafter"
START_TIMEOUT_S = 300.0  # the first process may have every kernel to compile
ASK_AGAIN_S = 0.01
PART_BYTES = 256 << 10
STAGES = {"starting": "first line", "memory_given": "region", "warmed_up": "warm"}


class Drafter:
    """One drafter process; `stages` are seconds since it was started."""

    def __init__(self, module: str, model: Path, socket: Path, folder: Path) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self._log = folder / f"drafter-{port}.log"
        environment = {
            "SKIM_DRAFTER_MODEL": str(model),
            "SKIM_DRAFTER_NAME": NAME,
            "SKIM_DRAFTER_LISTEN": self.address,
            "SKIM_DRAFTER_ADMIN_LISTEN": "127.0.0.1:0",
            "SKIM_DRAFTER_MEMORY_SOCKET": str(socket),
        }
        self._started_s, self._started_at = time.monotonic(), time.time()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module], env={**os.environ, **environment}, stderr=log
            )
        self.pid = self._process.pid

    def score(self, prompt: bytes) -> float:
        """Ask until it answers: seconds since the process was started."""
        requests = [
            drafter_pb2.ScoreRequest(config=drafter_pb2.ScoreConfig()),
            *(drafter_pb2.ScoreRequest(prompt=part) for part in split_parts(prompt, PART_BYTES)),
            drafter_pb2.ScoreRequest(end=prompt_end(prompt)),
        ]
        until_s = self._started_s + START_TIMEOUT_S
        while True:
            # A channel of its own each time: one that was refused waits before it tries again.
            with grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
                stub: Any = drafter_pb2_grpc.DrafterServiceStub(channel)
                try:
                    for response in stub.Score(iter(requests), timeout=START_TIMEOUT_S):
                        if response.WhichOneof("event") == "result":
                            return time.monotonic() - self._started_s
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
            if time.monotonic() > until_s or self._process.poll() is not None:
                raise RuntimeError(f"the drafter serves nothing; its log: {self._log.read_text()}")
            time.sleep(ASK_AGAIN_S)

    def stages(self) -> dict[str, Any]:
        """When it logged what, in seconds, and how it came by its weights."""
        found: dict[str, Any] = {}
        for line in self._log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                stage = STAGES.get(event["event"])
                if stage and stage not in found:
                    at = datetime.datetime.fromisoformat(event["timestamp"]).timestamp()
                    found[stage] = round(at - self._started_at, 3)
                if event["event"] == "memory_given":
                    found.setdefault("given", event["message"].upper())
        return found

    def kill(self) -> None:
        """kill -9."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, physical: Physical, folder: Path) -> None:
        self.options, self.physical, self.folder = options, physical, folder
        self.socket = folder / "memory.sock"
        self.landlord = Landlord(physical, MemorySettings(self.socket))
        self.rows: list[dict[str, Any]] = []
        text = "\n\n".join(build_document(options.tokens, lambda part: max(1, len(part) // 4)))
        self.prompt = text.encode()

    async def run(self) -> None:
        """The first process, then successors."""
        model = self.folder / "drafter.gguf"
        shape = SHAPES[self.options.model_shape]
        await asyncio.to_thread(write_random_gguf, model, shape, vocabulary=learn())
        await self.landlord.start()
        drafter = None
        try:
            drafter = await self._start(model, "nobody")
            for state in self.options.states:
                for _ in range(self.options.kills):
                    if state == "parked":
                        await self.landlord.park(NAME)
                    await asyncio.to_thread(drafter.kill)
                    drafter = await self._start(model, f"killed {state}")
        finally:
            if drafter is not None:
                drafter.kill()
            await self.landlord.close()

    async def _start(self, model: Path, after: str) -> Drafter:
        drafter = Drafter(self.options.service, model, self.socket, self.folder)
        try:
            scored_s = await asyncio.to_thread(drafter.score, self.prompt)
        except BaseException:
            drafter.kill()
            raise
        row = {"after": after, **drafter.stages(), "scored": round(scored_s, 3)}
        (region,) = self.landlord.regions()
        row["right_tenant"] = region.lease_pid == drafter.pid
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.rows.append(row)
        return drafter

    def summary(self) -> dict[str, Any]:
        """Everything, for the JSON line."""
        return {
            "bench": "successor",
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "gpu": self.physical.name,
            "model": self.options.model_shape,
            "prompt_bytes": len(self.prompt),
            "rows": self.rows,
        }


def table(summary: dict[str, Any]) -> str:
    """The figures for people."""
    stages = [*STAGES.values(), "scored"]
    lines = [["after", "given", *stages]]
    for row in summary["rows"]:
        times = [f"{row[stage]:.2f}" if stage in row else "-" for stage in stages]
        lines.append([row["after"], row.get("given", "-"), *times])
    head = f"{summary['gpu']}, {summary['model']}, seconds since the process was started"
    return "\n".join([head, *aligned(lines)])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.successor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model-shape", choices=SHAPES, default="qwen3-0.6b")
    add("--kills", type=int, default=3, help="in each state")
    add("--states", type=lambda text: text.split(","), default=["resident", "parked"])
    add("--tokens", type=int, default=4_096, help="about so many in the Score's prompt")
    add("--scratch", type=Path, default=Path("/dev/shm"), help="where the model goes for a while")
    add("--service", default=SERVICE, help="module of the drafter; a test has its own")
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str] | None = None,
    physical_in: Callable[[Path], Physical] | None = None,
) -> int:
    """Measure, print the table, then one JSON object; 1 when weights were read from disk again.

    Args:
        arguments: of the command line.
        physical_in: the GPU's memory, given the folder of the socket; None: the real GPU's.
    """
    options = parse(arguments)
    configure("bench", "warning")
    with tempfile.TemporaryDirectory(prefix="skim-successor-", dir=options.scratch) as folder:
        physical = physical_in(Path(folder)) if physical_in else open_physical()
        bench = Bench(options, physical, Path(folder))
        try:
            asyncio.run(bench.run())
        finally:
            physical.close()
    summary = bench.summary()
    print(table(summary))
    print(json.dumps(summary))
    successors = summary["rows"][1:]
    return 0 if all(row["given"] != "FILL" and row["right_tenant"] for row in successors) else 1


if __name__ == "__main__":
    sys.exit(main())
