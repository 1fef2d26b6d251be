"""The table of kernel variants: a launcher gets what is listed and nothing else."""

from __future__ import annotations

import pytest

from drafter_svc.cuda_attention import most_sparse_rows
from kernels.device import KernelSource
from kernels.errors import InvalidArgument
from kernels.ops.block_score import most_blocks, shared_bytes
from kernels.specialisation import Family
from tests.emulator.launching import SHARED_LIMITS

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


def test_longest_prompt_of_each_card_fits_its_shared_memory_to_the_last_block() -> None:
    for arch, limit in SHARED_LIMITS.items():
        for head_dim in (64, 128, 256):
            most = most_blocks(arch, head_dim)
            assert shared_bytes(head_dim, most) <= limit < shared_bytes(head_dim, most + 1)
            assert most_sparse_rows(arch, head_dim) >= 262_144  # of the default settings
