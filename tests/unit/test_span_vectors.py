"""Every vector of protos/testdata/spans.json, through the Python implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skim import spans
from skim.errors import SpansNotCanonical
from skim.spans import Span

PATH = Path(__file__).parents[2] / "protos" / "testdata" / "spans.json"
VECTORS: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text(encoding="utf-8"))


def cases(kind: str) -> Any:
    return pytest.mark.parametrize("case", VECTORS[kind], ids=lambda case: case["name"])


def to_spans(pairs: list[list[int]]) -> list[Span]:
    return [Span(*pair) for pair in pairs]


@pytest.mark.parametrize("kind", ["coding", "rounding", "rejected", "tokens"])
def test_vectors_have_unique_names_and_true_sizes(kind: str) -> None:
    names = [case["name"] for case in VECTORS[kind]]
    assert len(names) == len(set(names)) and names
    for case in VECTORS[kind]:
        assert len(case["prompt"].encode()) == case["prompt_bytes"], case["name"]


@cases("coding")
def test_encode_gives_the_vector_s_delta_code(case: dict[str, Any]) -> None:
    assert spans.encode(to_spans(case["spans"])) == (case["gaps"], case["lengths"])


@cases("coding")
def test_decode_gives_the_vector_s_spans(case: dict[str, Any]) -> None:
    prompt = case["prompt"].encode()
    assert spans.decode(case["gaps"], case["lengths"], prompt) == to_spans(case["spans"])


@cases("rounding")
def test_canonical_rounds_outward_and_merges(case: dict[str, Any]) -> None:
    prompt = case["prompt"].encode()
    assert spans.canonical(to_spans(case["ranges"]), prompt) == to_spans(case["spans"])


@cases("rejected")
def test_decode_refuses_what_is_not_canonical(case: dict[str, Any]) -> None:
    with pytest.raises(SpansNotCanonical) as refused:
        spans.decode(case["gaps"], case["lengths"], case["prompt"].encode())
    assert refused.value.reason == case["reason"]
    offending = case["offending_span"]
    assert refused.value.field == ("spans" if offending is None else f"spans[{offending}]")


@cases("tokens")
def test_tokens_overlapping_gives_the_vector_s_ranges(case: dict[str, Any]) -> None:
    spans.check_canonical(to_spans(case["spans"]), case["prompt"].encode())
    kept = spans.tokens_overlapping(case["token_ends"], to_spans(case["spans"]))
    assert [list(pair) for pair in kept] == case["kept"]
