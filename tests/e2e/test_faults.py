"""Processes that die and clients that vanish, in the middle of requests."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from skim.cli.service_process import Status
from skim.client import Client
from skim.client_types import Finish, Plan, Progress, Text
from skim.errors import Unavailable
from tests.e2e.conftest import ROOT, WAIT_S, System, until
from tests.tools import has_ended

Prose = Callable[[int], str]
QUESTION = "What is this about?"
# A request of minutes: what is measured ends long before it would.
ENDLESS = {"max_tokens": 2_000, "ignore_eos": True, "speculation": False}


def drafter_serves(client: Client) -> bool:
    return all(model.serving for model in client.models().models)


@pytest.fixture
def healing(system: System, client: Client) -> Iterator[None]:
    """Leave the stack as it was found: every service up, nothing running."""
    yield
    for state in system.stack.states():
        system.stack.wait_for(state.name, Status.READY, restarts=0, timeout_s=WAIT_S)
    until(lambda: drafter_serves(client), "the drafters serve again")
    until(system.idle, "the target is idle again")


@pytest.mark.usefixtures("healing")
def test_drafter_killed_while_it_scores_leaves_the_answer_to_a_full_prefill(
    system: System, client: Client, prose: Prose
) -> None:
    plan, finish = None, None
    with client.ask(QUESTION, prose(6_000), mode="skim", max_tokens=4, stream=True) as stream:
        for event in stream:
            match event:
                case Progress(stage="score") if plan is None:
                    system.stack.kill("drafter")
                case Plan():
                    plan = event
                case Finish():
                    finish = event
    assert plan is not None and finish is not None
    assert (plan.skimmed, plan.full_reason) == (False, "drafter_failed")
    assert "skim-drafter" in plan.detail
    assert finish.usage.kept_tokens == finish.usage.prompt_tokens


@pytest.mark.usefixtures("healing")
def test_killed_drafter_is_restarted_and_skims_again(
    system: System, client: Client, prose: Prose
) -> None:
    restarts = next(s.restarts for s in system.stack.states() if s.name == "drafter")
    system.stack.kill("drafter")
    system.stack.wait_for("drafter", Status.READY, restarts=restarts + 1, timeout_s=WAIT_S)
    until(lambda: drafter_serves(client), "the gateway has seen it")
    assert client.ask(QUESTION, prose(1_500), mode="skim", max_tokens=2).plan.skimmed


@pytest.mark.usefixtures("healing")
def test_engine_killed_fails_that_request_and_serves_the_next(
    system: System, client: Client, prose: Prose
) -> None:
    restarts = system.load().engine_restarts
    with pytest.raises(Unavailable) as caught:
        with client.ask(QUESTION, prose(1_500), mode="full", stream=True, **ENDLESS) as stream:
            for event in stream:
                engine = system.engine() if isinstance(event, Text) else None
                if engine is not None:
                    engine.send_signal(signal.SIGKILL)
    assert caught.value.reason == "ENGINE_RESTARTED"
    assert client.ask(QUESTION, prose(500), max_tokens=4).finish.usage.completion_tokens > 0
    assert system.load().engine_restarts == restarts + 1


@pytest.mark.usefixtures("healing")
def test_target_service_killed_comes_back_with_an_engine_of_its_own(
    system: System, client: Client
) -> None:
    first = system.engine()
    assert first is not None
    restarts = next(s.restarts for s in system.stack.states() if s.name == "target")
    system.stack.kill("target")
    system.stack.wait_for("target", Status.READY, restarts=restarts + 1, timeout_s=WAIT_S)
    until(lambda: has_ended(first), "the killed service's engine has ended")
    until(lambda: client.models().target.serving, "the gateway has seen it")
    assert client.ask(QUESTION, "A few words.", max_tokens=2).finish.usage.completion_tokens > 0


VANISHING = """
import sys
from skim.client import Client
from skim.client_types import Progress, Text
address, stage, document = sys.argv[1], sys.argv[2], sys.stdin.read()
options = dict(mode="full", max_tokens=2000, ignore_eos=True, speculation=False)
with Client(address).ask("What?", document, stream=True, **options) as stream:
    for event in stream:
        prefill = isinstance(event, Progress) and event.stage == "prefill"
        if prefill if stage == "prefill" else isinstance(event, Text):
            print("here", flush=True)
"""


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_client_that_vanishes_frees_the_target(
    system: System, client: Client, prose: Prose, stage: str
) -> None:
    document = prose(12_000 if stage == "prefill" else 1_000)
    vanishing = subprocess.Popen(
        [sys.executable, "-c", VANISHING, system.address, stage],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    with vanishing:
        assert vanishing.stdin and vanishing.stdout
        vanishing.stdin.write(document)
        vanishing.stdin.close()
        assert vanishing.stdout.readline() == "here\n"
        assert system.load().running == 1
        watch = system.own_time()
        vanishing.send_signal(signal.SIGKILL)
        until(system.idle, "the work of a client that is gone is freed")
        # By design within a second; what is left of the request takes ten times this limit.
        assert watch.seconds() < 3.0


def test_cancelled_request_frees_the_target_and_the_drafter(
    system: System, client: Client, prose: Prose
) -> None:
    scoring = threading.Event()
    with client.ask(QUESTION, prose(12_000), mode="skim", stream=True, **ENDLESS) as stream:
        for event in stream:
            if isinstance(event, Progress) and event.stage == "score":
                scoring.set()
                break
        watch = system.own_time()
    assert scoring.is_set()
    until(system.idle, "the target is idle")
    assert watch.seconds() < 3.0
    assert client.ask(QUESTION, prose(500), max_tokens=2).finish.usage.completion_tokens > 0
