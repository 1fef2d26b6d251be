"""What the services' own layers allow is what the shared checks at their edges let through."""

from __future__ import annotations

from drafter_svc import backend
from skim import request_checks
from target_svc import sampling


def test_edges_let_every_scorer_of_the_drafter_through() -> None:
    assert request_checks.SCORERS == backend.SCORERS


def test_edges_let_as_many_logprobs_through_as_the_sampler_gives() -> None:
    assert request_checks.MAX_TOP_LOGPROBS == sampling.MAX_TOP_LOGPROBS
