"""The Hopper twins: tiles as the copy engine lays them, products by descriptor, and defects.

What is right runs on the emulator and, with `-m gpu`, on a GPU; defects on the emulator only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.device import KernelSource
from kernels.errors import LaunchError
from kernels.reference.rounding import round_to_bf16
from tests.emulator.running import Map, Run

DEFECTS = (
    "NONE NO_WAIT NO_FENCE EARLY_USE EARLY_OVERWRITE SWAPPED_OFFSETS LATE_COUNT IN_FLIGHT "
    "NAMED_TOO_EARLY ONE_WARP_LESS UNALIGNED_TILE"
).split()
Array = np.ndarray[Any, Any]


def probe(entry: str, width: int = 64) -> KernelSource:
    return KernelSource("hopper_probes.cu", entry, (("WIDTH", width),))


def to_bf16(values: Array) -> Array:
    """Raw bits of the nearest bfloat16."""
    return (round_to_bf16(values.astype(np.float32)).view(np.uint32) >> 16).astype(np.uint16)


def to_float(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def run_hopper(
    run: Run, source: KernelSource, *arguments: Any, defect: str = "NONE", **options: Any
) -> Array:
    """The last array after a launch of one warpgroup."""
    arguments = (*arguments, np.int32(DEFECTS.index(defect)))
    return run(source, *arguments, block=128, arch="sm_90a", **options)[-1]


def run_tile(run: Run, x: int, y: int, defect: str = "NONE") -> Array:
    """A tile at (x, y) of the matrix 1, 2, 3 ... [80, 96]."""
    matrix = np.arange(1, 80 * 96 + 1, dtype=np.uint16).reshape(80, 96)
    arguments = (Map(matrix, (64, 64)), np.zeros((64, 64), np.uint16), np.int32(x), np.int32(y))
    return run_hopper(run, probe("tile"), *arguments, defect=defect, shared_bytes=9216)


def run_products(run: Run, width: int, defect: str = "NONE", **options: Any) -> tuple[Array, Array]:
    """D of `from_shared` and what it should be, with an A of 60 rows and 120 columns."""
    rng = np.random.default_rng(6)
    a, b = to_bf16(rng.standard_normal((60, 120))), to_bf16(rng.standard_normal((width, 128)))
    out = run_hopper(
        run,
        probe("from_shared", width),
        Map(a, (64, 64)),
        Map(b, (width, 64)),
        np.full((64, width), np.nan, np.float32),
        defect=defect,
        shared_bytes=2 * 128 * (64 + width),
        **options,
    )
    wanted = np.zeros((64, width))
    wanted[:60] = to_float(a).astype(np.float64) @ to_float(b[:, :120]).astype(np.float64).T
    return out, wanted


@pytest.mark.parametrize(("x", "y"), [(0, 0), (32, 16), (64, 40), (-8, -5), (200, 0)])
def test_tile_is_swizzled_and_zero_outside_the_matrix(run_both: Run, x: int, y: int) -> None:
    matrix = np.arange(1, 80 * 96 + 1, dtype=np.uint16).reshape(80, 96)
    padded = np.zeros((80 + 128, 96 + 512), np.uint16)
    padded[64:144, 64:160] = matrix
    straight = padded[64 + y : 128 + y, 64 + x : 128 + x]
    rows, chunks = np.arange(64)[:, None], np.arange(8)
    wanted = straight.reshape(64, 8, 8)[rows, chunks ^ (rows % 8)].reshape(64, 64)
    np.testing.assert_array_equal(run_tile(run_both, x, y), wanted)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_product_of_two_tiles_by_descriptor_is_the_matrix_product(
    run_both: Run, width: int, order: str
) -> None:
    out, wanted = run_products(run_both, width, order=order)
    np.testing.assert_allclose(
        out, wanted, rtol=0, atol=1e-3
    )  # 128 sums up to 40: 128 * 2^-23 * 40


@pytest.mark.parametrize("width", [64, 128, 256])
def test_product_of_registers_and_a_row_major_tile_is_the_matrix_product(
    run_both: Run, width: int
) -> None:
    out, wanted = run_registers(run_both, width)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-4)  # 33 sums up to 25


def run_registers(run: Run, width: int, defect: str = "NONE") -> tuple[Array, Array]:
    rng = np.random.default_rng(7)
    a, v = to_bf16(rng.standard_normal((64, 32))), to_bf16(rng.standard_normal((32, width)))
    start = rng.standard_normal((64, width)).astype(np.float32)
    out = run_hopper(
        run,
        probe("from_registers", width),
        a.view(np.uint32),
        Map(v, (32, 64)),
        start,
        defect=defect,
        shared_bytes=64 * width,
    )
    return out, start + to_float(a).astype(np.float64) @ to_float(v).astype(np.float64)


def test_exchanged_offsets_of_a_descriptor_give_another_product(run: Run) -> None:
    out, wanted = run_registers(run, 128, "SWAPPED_OFFSETS")
    assert not np.allclose(out, wanted, atol=1e-2)


def run_ring(run: Run, defect: str = "NONE", **options: Any) -> Array:
    matrix = np.ones((40, 64), np.float32)
    matrix *= 2.0 ** np.arange(5).repeat(8)[:, None]
    return run_hopper(
        run,
        probe("ring"),
        Map(to_bf16(matrix), (8, 64)),
        np.full(96, np.nan, np.float32),
        np.int32(5),
        defect=defect,
        shared_bytes=2048,
        **options,
    )


def test_ring_of_buffers_hands_every_tile_over_in_both_orders(run_both: Run) -> None:
    assert (run_ring(run_both, check_races=True) == 31 * 512).all()


def test_buffer_released_before_it_is_read_gives_nan(run: Run) -> None:
    assert np.isnan(run_ring(run, "EARLY_OVERWRITE")).any()


def test_barrier_that_expects_one_arrival_too_many_is_reported(run: Run) -> None:
    match = "waits at mbarrier.try_wait for parity 0 of the mbarrier at 0x[0-9a-f]+, which lacks 1"
    with pytest.raises(LaunchError, match=match):
        run_ring(run, "LATE_COUNT")


def test_tile_that_is_not_waited_for_is_refused(run: Run) -> None:
    with pytest.raises(LaunchError, match="the block ends with 1 tensor copies under way"):
        run_tile(run, 0, 0, "NO_WAIT")


def test_wrong_count_of_bytes_is_reported(run: Run) -> None:
    with pytest.raises(LaunchError, match="which lacks 0 of 1 arrivals and -16 bytes"):
        run_tile(run, 0, 0, "LATE_COUNT")


def test_tile_at_a_misaligned_address_is_refused(run: Run) -> None:
    with pytest.raises(LaunchError, match="is not 128-byte aligned"):
        run_tile(run, 0, 0, "UNALIGNED_TILE")


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("NO_FENCE", "wgmma.mma_async without a wgmma.fence"),
        ("EARLY_USE", "wrote its accumulator 3 while a wgmma was under way"),
        ("NAMED_TOO_EARLY", "an accumulator it names is still under way"),
        ("ONE_WARP_LESS", "warp 0 issued 8 wgmma, warp 3 7"),
        ("IN_FLIGHT", "ends with a wgmma under way"),
    ],
)
def test_misuse_of_wgmma_is_refused(run: Run, defect: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        run_products(run, 64, defect)


def test_operand_overwritten_before_the_wait_spoils_the_product(run: Run) -> None:
    out, wanted = run_products(run, 64, "EARLY_OVERWRITE")
    assert not np.allclose(out, wanted, atol=1e-2)
