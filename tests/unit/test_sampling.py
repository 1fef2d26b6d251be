"""Choosing tokens from a row of logits: each filter against a plain, slow reading of its rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skim.errors import EngineFault, InvalidRequest
from target_svc.sampling import Sampler, Sampling, candidates

GREEDY = Sampling()


def row(*logits: float) -> np.ndarray:
    return np.array(logits, np.float32)


def kept_slowly(logits: np.ndarray, sampling: Sampling) -> list[int]:
    """The rule in its own words: temperature, top_k, top_p, min_p, each renormalised."""
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    ids = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    total = sum(weights[i] for i in ids)
    nucleus: list[int] = []
    mass = 0.0
    for i in ids:
        nucleus.append(i)
        mass += weights[i] / total
        if sampling.top_p < 1 and mass >= sampling.top_p:
            break
    return [i for i in nucleus if weights[i] >= sampling.min_p * weights[nucleus[0]]]


def test_greedy_takes_the_maximum() -> None:
    assert Sampler(GREEDY).choose(row(0.5, 2.0, -1.0)) == 1


def test_greedy_takes_the_lowest_id_of_equal_maxima() -> None:
    assert Sampler(GREEDY).choose(row(0.5, 2.0, 2.0)) == 1


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0)])
def test_nan_is_never_chosen(sampling: Sampling) -> None:
    chosen = {Sampler(sampling).choose(row(math.nan, 1.0, math.nan, -math.inf)) for _ in range(50)}
    assert chosen == {1}


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_row_without_a_usable_entry_is_a_fault(value: float) -> None:
    with pytest.raises(EngineFault) as caught:
        Sampler(GREEDY).choose(row(value, value))
    assert caught.value.reason == "LOGITS_NOT_FINITE"


def test_one_infinite_logit_is_a_fault() -> None:
    with pytest.raises(EngineFault):
        Sampler(Sampling(temperature=1.0)).choose(row(1.0, math.inf, 2.0))


def test_top_k_keeps_the_lower_ids_of_equal_logits() -> None:
    ids, _ = candidates(row(1, 3, 1, 1, 3), Sampling(temperature=1.0, top_k=3))
    assert ids.tolist() == [1, 4, 0]


def test_top_p_includes_the_token_that_reaches_it() -> None:
    # Probabilities 0.5, 0.25, 0.25: 0.6 needs the second one too.
    ids, _ = candidates(np.log(row(0.5, 0.25, 0.25)), Sampling(temperature=1.0, top_p=0.6))
    assert ids.tolist() == [0, 1]


def test_top_p_always_keeps_one_token() -> None:
    ids, _ = candidates(row(1, 2, 3), Sampling(temperature=1.0, top_p=1e-9))
    assert ids.tolist() == [2]


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    # 0.4, 0.3, 0.2, 0.1; top_k 2 leaves 4/7 and 3/7, and 4/7 alone reaches 0.5.
    ids, _ = candidates(np.log(row(0.4, 0.3, 0.2, 0.1)), Sampling(1.0, top_k=2, top_p=0.5))
    assert ids.tolist() == [0]


def test_temperature_comes_before_top_p() -> None:
    logits = np.log(row(0.6, 0.4))
    assert candidates(logits, Sampling(1.0, top_p=0.55))[0].tolist() == [0]
    assert candidates(logits, Sampling(5.0, top_p=0.55))[0].tolist() == [0, 1]


def test_min_p_is_relative_to_the_most_likely() -> None:
    ids, _ = candidates(np.log(row(0.5, 0.26, 0.24)), Sampling(temperature=1.0, min_p=0.5))
    assert ids.tolist() == [0, 1]


def test_nucleus_of_a_large_flat_row_reaches_past_its_first_guess() -> None:
    ids, _ = candidates(np.zeros(5000, np.float32), Sampling(temperature=1.0, top_p=0.5))
    assert ids.tolist() == list(range(2500))


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 600),
    st.sampled_from([0.2, 1.0, 3.0]),
    st.integers(0, 40),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_filters_keep_what_their_rules_say(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    ids, weights = candidates(logits, sampling)
    assert sorted(ids.tolist()) == sorted(kept_slowly(logits, sampling))
    scaled = logits[ids].astype(np.float64) / temperature
    expected = np.exp(scaled - scaled.max())
    np.testing.assert_allclose(weights / weights.max(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, 0, 0.95)]
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits = np.log(row(0.5, 0.3, 0.15, 0.05))
    ids, weights = candidates(logits, sampling)
    sampler, count = Sampler(sampling), 20_000
    seen = np.bincount([sampler.choose(logits) for _ in range(count)], minlength=4) / count
    expected = np.zeros(4)
    expected[ids] = weights / weights.sum()
    # Five standard deviations of a binomial share.
    assert np.abs(seen - expected).max() <= 5 * math.sqrt(0.25 / count)


def test_same_seed_gives_the_same_tokens() -> None:
    logits = np.random.default_rng(1).normal(0, 1, 500).astype(np.float32)
    first, second = Sampler(Sampling(1.0, seed=9)), Sampler(Sampling(1.0, seed=9))
    assert [first.choose(logits) for _ in range(50)] == [second.choose(logits) for _ in range(50)]


def test_other_seeds_give_other_tokens() -> None:
    logits = np.random.default_rng(1).normal(0, 1, 500).astype(np.float32)
    draws = [
        [sampler.choose(logits) for _ in range(20)]
        for sampler in (Sampler(Sampling(1.0, seed=9)), Sampler(Sampling(1.0, seed=10)))
    ]
    assert draws[0] != draws[1]


def test_tiny_temperature_is_greedy_without_a_warning() -> None:
    assert Sampler(Sampling(temperature=1e-300)).choose(row(1.0, 1.5, 1.25)) == 1


def test_logprobs_are_those_of_the_raw_row() -> None:
    logits = np.log(row(0.2, 0.5, 0.3))
    got = Sampler(Sampling(temperature=4.0, top_k=1, top_logprobs=2)).logprobs(logits, 0)
    assert got.chosen == pytest.approx(math.log(0.2), abs=1e-6)  # float32 inputs
    assert got.top_ids.tolist() == [1, 2]
    np.testing.assert_allclose(got.top_logprobs, np.log([0.5, 0.3]), atol=1e-6)


def test_no_alternatives_are_given_when_none_were_asked_for() -> None:
    got = Sampler(Sampling(top_logprobs=0)).logprobs(row(1, 2), 1)
    assert len(got.top_ids) == len(got.top_logprobs) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("seed", -1),
        ("seed", 2**64),
        ("top_logprobs", 21),
    ],
)
def test_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Sampling(**{field: value}).check()  # type: ignore[arg-type]
    assert caught.value.field == f"sampling.{field}"
    assert caught.value.metadata["got"] == repr(value)
