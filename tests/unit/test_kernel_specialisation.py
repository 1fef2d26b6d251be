"""The table of kernel variants: a launcher gets what is listed and nothing else."""

from __future__ import annotations

import pytest

from kernels.device import KernelSource
from kernels.errors import InvalidArgument
from kernels.specialisation import Family

FAMILY = Family("k.cu", "k", HEAD_DIM=(64, 128), ROPE=("NEOX", "NONE"))


def test_listed_variant_carries_its_defines_in_the_stated_order() -> None:
    source = FAMILY.source(ROPE="NONE", HEAD_DIM=64)
    assert source == KernelSource("k.cu", "k", (("HEAD_DIM", 64), ("ROPE", "NONE")))


def test_variants_are_the_product_of_the_values() -> None:
    assert len(set(FAMILY.sources())) == 4
    assert Family("k.cu", "k").sources() == (KernelSource("k.cu", "k"),)


@pytest.mark.parametrize(
    "defines",
    [
        {"HEAD_DIM": 96, "ROPE": "NEOX"},
        {"HEAD_DIM": 64},
        {"HEAD_DIM": 64, "ROPE": "NEOX", "GROUP": 2},
        {},
    ],
)
def test_unlisted_defines_are_refused(defines: dict[str, int | str]) -> None:
    with pytest.raises(InvalidArgument, match=r"HEAD_DIM in \(64, 128\)"):
        FAMILY.source(**defines)
