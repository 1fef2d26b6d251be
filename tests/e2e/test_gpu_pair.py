"""The bundled pair on one GPU, its memory shared, answers as it does on the CPU; also after kills.

Three real services each time. What is kept is compared exactly: the GPU's scores differ from the
CPU's by a few per cent (bf16), which moved no chunk of documents like these on the emulated GPU.
Answers are greedy numbers that the documents hide; all seeds are fixed. Documents are longer than
the 8,192 tokens below which no block of the drafter's attention is dropped. The stacks start in
turn, since a park is counted on the whole GPU.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.ruler import RulerSpec, build_sample
from skim.cli.bundled import DRAFTER, bundled_model
from skim.cli.service_process import Status
from skim.cli.stack import LocalStack
from skim.cli.stack_plan import StackOptions
from skim.client import Client
from skim.client_types import Answer, Options
from skim.demo_document import build_demo
from skim.v1 import drafter_pb2, memory_pb2, memory_pb2_grpc
from tests.e2e.conftest import ENVIRONMENT, WAIT_S, engine_of, until
from tests.tools import require_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

NAME = Path(DRAFTER).stem
KEEP_RATIO = 0.1
ON_CPU = {"SKIM_DRAFTER_BACKEND": "cpu", "SKIM_TARGET_GPU_LAYERS": "0"}
# What another GPU holds is none of ours, and llama.cpp would spread over all that it sees.
ONE_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
ON_GPU = {"SKIM_DRAFTER_BACKEND": "cuda", **ONE_GPU}


@dataclass(frozen=True)
class Case:
    """A document, its question, and what the answer must hold."""

    document: str
    question: str
    expected: str


class GpuStack:
    """A running stack and a client of it."""

    def __init__(self, stack: LocalStack, client: Client, log_dir: Path) -> None:
        self.stack, self.client, self._log_dir = stack, client, log_dir

    def ask(self, case: Case, mode: str) -> Answer:
        options: Options = {"keep_ratio": KEEP_RATIO, "max_tokens": 16, "want_spans": True}
        options["mode"] = "skim" if mode == "skim" else "full"
        return self.client.ask(case.question, case.document, **options)

    def region(self) -> memory_pb2.Region:
        """The drafter's weights as the landlord sees them now."""
        with self._memory() as service:
            (found,) = service.ListRegions(memory_pb2.ListRegionsRequest(), timeout=WAIT_S).regions
            return found

    def until_region(self, state: str, **facts: Any) -> memory_pb2.Region:
        """Wait until the region is in a state, and what else is asked for holds."""
        wanted = drafter_pb2.ResidencyState.Value(f"RESIDENCY_STATE_{state}")

        def look() -> memory_pb2.Region | None:
            try:
                with self._memory() as service:
                    answer = service.ListRegions(memory_pb2.ListRegionsRequest(), timeout=WAIT_S)
            except grpc.RpcError:  # the target is on its way back
                return None
            for found in answer.regions:
                same = all(getattr(found, name) == value for name, value in facts.items())
                if found.state == wanted and same:
                    return found
            return None

        region: memory_pb2.Region = until(look, f"the region is {state} with {facts}")
        return region

    def park(self) -> memory_pb2.ParkResponse:
        with self._memory() as service:
            answer: memory_pb2.ParkResponse = service.Park(
                memory_pb2.ParkRequest(name=NAME), timeout=WAIT_S
            )
            return answer

    def kill(self, service: str) -> int:
        """kill -9; the process that the stack started in its place, once it serves."""
        restarts = next(s.restarts for s in self.stack.states() if s.name == service)
        self.stack.kill(service)
        self.stack.wait_for(service, Status.READY, restarts=restarts + 1, timeout_s=WAIT_S)
        self.until_served()
        pid = self.stack.pid(service)
        assert pid is not None
        return pid

    def until_served(self) -> None:
        def served() -> bool:
            models = self.client.models()
            return models.target.serving and all(model.serving for model in models.models)

        until(served, "the gateway has heard that all serve")

    def memory_given(self) -> list[str]:
        """How each drafter process so far came by its memory: FILL is from its model file."""
        given = []
        for line in (self._log_dir / "drafter.log").read_text().splitlines():
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "memory_given":
                given.append(event["message"].upper())
        return given

    @contextmanager
    def _memory(self) -> Iterator[Any]:
        with grpc.insecure_channel(self.stack.address("target", admin=True)) as channel:
            yield memory_pb2_grpc.MemoryServiceStub(channel)


@contextmanager
def started(log_dir: Path, environment: Mapping[str, str]) -> Iterator[GpuStack]:
    options = StackOptions(
        drafters=(bundled_model(DRAFTER),),
        base_port=0,
        log_dir=log_dir,
        grace_s=2.0,
        environment={**ENVIRONMENT, **environment},
    )
    with LocalStack(options) as stack, Client(stack.gateway_address, deadline_s=WAIT_S) as client:
        made = GpuStack(stack, client, log_dir)
        made.until_served()
        yield made


def make_cases(count_tokens: Callable[[str], int]) -> dict[str, Case]:
    """A needle in prose, short and long; one in noise; one of sixteen keys."""
    cases = {}
    for tokens in (9_000, 16_000):
        demo = build_demo(tokens, count_tokens, seed=3)
        cases[f"prose {tokens}"] = Case(demo.text, demo.question, demo.answer)
    specs = {
        "noise 9000": (RulerSpec("niah_single", "noise"), 9_000),
        "keys 12000": (RulerSpec("niah_multikey", "prose"), 12_000),
    }
    for name, (spec, tokens) in specs.items():
        sample = build_sample(spec, tokens, count_tokens, seed=1)
        cases[name] = Case(sample.document, sample.question, sample.answers[0])
    return cases


# Full prefills of the longer ones take the CPU too long.
ASKED = [(name, "skim") for name in ("prose 9000", "prose 16000", "noise 9000", "keys 12000")]
ASKED += [("prose 9000", "full"), ("noise 9000", "full")]


@dataclass(frozen=True)
class Expected:
    """The cases, and what the CPU makes of them."""

    cases: dict[str, Case]
    answers: dict[tuple[str, str], Answer]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    require_gpu()
    with started(tmp_path_factory.mktemp("cpu"), ON_CPU) as stack:
        cases = make_cases(stack.client.count_tokens)
        answers = {asked: stack.ask(cases[asked[0]], asked[1]) for asked in ASKED}
    return Expected(cases, answers)


@pytest.fixture(scope="module", params=["auto", "always"])
def on_gpu(
    request: pytest.FixtureRequest, on_cpu: Expected, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GpuStack]:
    environment = {**ON_GPU, "SKIM_TARGET_PARK_POLICY": request.param}
    with started(tmp_path_factory.mktemp("gpu"), environment) as stack:
        assert stack.stack.sharing.environment, stack.stack.sharing.line
        yield stack


def check(stack: GpuStack, on_cpu: Expected, name: str, mode: str) -> None:
    """The same as on the CPU, byte for byte."""
    found, expected = stack.ask(on_cpu.cases[name], mode), on_cpu.answers[name, mode]
    assert found.plan.skimmed == expected.plan.skimmed == (mode == "skim"), found.plan.detail
    assert found.plan.spans == expected.plan.spans
    assert found.finish.usage.kept_tokens == expected.finish.usage.kept_tokens
    assert found.text == expected.text
    assert on_cpu.cases[name].expected in found.text


@pytest.mark.parametrize(("name", "mode"), ASKED)
def test_gpu_keeps_and_answers_what_the_cpu_does(
    on_gpu: GpuStack, on_cpu: Expected, name: str, mode: str
) -> None:
    check(on_gpu, on_cpu, name, mode)


def test_weights_that_were_parked_score_the_same(on_gpu: GpuStack, on_cpu: Expected) -> None:
    on_gpu.park()
    before = on_gpu.until_region("PARKED").generation
    check(on_gpu, on_cpu, "prose 9000", "skim")
    assert on_gpu.region().generation > before


# ---- kill -9 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(on_cpu: Expected, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuStack]:
    """A stack whose processes are killed, policy auto: weights stay where they are."""
    with started(tmp_path_factory.mktemp("kills"), ON_GPU) as stack:
        assert stack.stack.sharing.environment, stack.stack.sharing.line
        check(stack, on_cpu, "prose 9000", "skim")
        yield stack


@pytest.mark.parametrize("state", ["RESIDENT", "PARKED"])
def test_successor_of_a_killed_drafter_scores_without_reading_its_file(
    shared: GpuStack, on_cpu: Expected, state: str
) -> None:
    if state == "PARKED":
        assert shared.park().freed_bytes == shared.region().size_bytes
    before, given = shared.until_region(state), shared.memory_given()
    successor = shared.kill("drafter")
    check(shared, on_cpu, "prose 9000", "skim")
    after = shared.until_region("RESIDENT", lease_pid=successor)
    assert (after.generation == before.generation) == (state == "RESIDENT")
    assert given.count("FILL") == shared.memory_given().count("FILL")


def test_killed_engine_loses_no_region(shared: GpuStack, on_cpu: Expected) -> None:
    before = shared.until_region("RESIDENT")
    engine = engine_of(shared.stack.pid("target") or 0)
    assert engine is not None
    engine.send_signal(signal.SIGKILL)
    engine.wait(WAIT_S)
    check(shared, on_cpu, "prose 9000", "skim")
    assert shared.region() == before


def test_drafter_of_a_killed_target_registers_with_the_next(
    shared: GpuStack, on_cpu: Expected
) -> None:
    drafter = shared.stack.pid("drafter")
    shared.kill("target")
    shared.until_region("RESIDENT", lease_pid=drafter)
    check(shared, on_cpu, "prose 9000", "skim")
    assert shared.stack.pid("drafter") == drafter
