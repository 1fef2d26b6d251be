"""What the drafter makes of a request's config: settings, defaults, exact fractions."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafter_svc.config import DrafterSettings
from drafter_svc.edge import ask_from_proto
from skim.errors import ConfigError
from skim.v1 import common_pb2 as pb
from skim.v1 import drafter_pb2

SETTINGS = DrafterSettings(
    model=Path("a.gguf"), keep_ratio=0.2, tail_chunks=7, scorer="ends", alpha=0.3, min_keep=0.05
)


def test_unset_fields_come_from_the_settings() -> None:
    ask = ask_from_proto(drafter_pb2.ScoreConfig(), SETTINGS)
    assert (ask.selection.keep_ratio, ask.selection.tail_chunks, ask.scorer) == (0.2, 7, "ends")
    assert (ask.selection.coverage, ask.attention.alpha, ask.seed) == (None, 0.3, 0)
    assert ask.request_id != ""


def test_set_fields_win_also_when_they_are_zero() -> None:
    config = drafter_pb2.ScoreConfig(
        request_id="r",
        selection=pb.SelectionConfig(tail_chunks=0, head_chunks=0),
        scoring=pb.ScoringConfig(alpha=0.0, scorer="mid_layer"),
    )
    ask = ask_from_proto(config, SETTINGS)
    assert (ask.selection.tail_chunks, ask.selection.head_chunks) == (0, 0)
    assert (ask.attention.alpha, ask.scorer, ask.request_id) == (0.0, "mid_layer", "r")


@pytest.mark.parametrize("ratio", [0.1, 0.7, 0.29, 0.05, 1.0, 1e-6])
def test_fraction_of_the_wire_is_the_decimal_that_was_meant(ratio: float) -> None:
    config = drafter_pb2.ScoreConfig(selection=pb.SelectionConfig(keep_ratio=ratio))
    assert ask_from_proto(config, SETTINGS).selection.keep_ratio == ratio


@pytest.mark.parametrize(
    ("given", "bounds"),
    [({"max_keep": 0.01}, (0.01, 0.01)), ({"min_keep": 0.5}, (0.5, 0.5)), ({}, (0.05, 0.3))],
)
def test_bound_that_is_set_moves_the_default_of_the_other(
    given: dict[str, float], bounds: tuple[float, float]
) -> None:
    config = drafter_pb2.ScoreConfig(
        selection=pb.SelectionConfig(coverage=0.9, **given),
        scoring=pb.ScoringConfig(scorer="specprefill"),
    )
    selection = ask_from_proto(config, SETTINGS).selection
    assert (selection.min_keep, selection.max_keep) == bounds


def test_catalogue_lists_the_model_of_the_start_first() -> None:
    settings = DrafterSettings(model=Path("/m/a.gguf"), models="b=/m/b.gguf, c=/m/c d.gguf,")
    assert settings.catalogue() == {
        "a": Path("/m/a.gguf"),
        "b": Path("/m/b.gguf"),
        "c": Path("/m/c d.gguf"),
    }
    assert list(DrafterSettings(models="b=/m/b.gguf").catalogue()) == ["b"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({}, "MODELS"),
        ({"model": "a.gguf", "models": "a=b.gguf"}, "named twice"),
        ({"models": "just-a-path.gguf"}, "not name=path"),
        ({"model": "a.gguf", "max_keep": 0.01}, "MAX_KEEP"),
        ({"model": "a.gguf", "pool_kernel": 12}, "odd"),
        ({"model": "a.gguf", "name": "a b"}, "NAME"),
        ({"model": "a.gguf", "scorer": "best"}, "SCORER"),
        ({"model": "a.gguf", "keep": 1}, "keep"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(
    overrides: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        DrafterSettings.load(overrides=overrides)
