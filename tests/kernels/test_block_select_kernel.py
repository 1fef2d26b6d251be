"""The selecting kernel gives the very lists of the reference for the same float32 masses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.device import Device
from kernels.errors import InvalidArgument, KernelError
from kernels.ops.block_select import MAX_BLOCKS, block_select
from kernels.reference import BlockLists, BlockRule, block_mass, block_mean, block_score
from kernels.reference import block_select as reference_select
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.inputs import structured_qkv
from tests.kernels.on_device import Arrays
from tests.tools import require_tool

Mass = NDArray[np.float32]
PLAIN = BlockRule(alpha=0.1, sink_blocks=0, window_blocks=1, last_full_blocks=0, max_density=1.0)
RULES = {
    "default": BlockRule(),
    "threshold alone": PLAIN,
    "everything": BlockRule(alpha=0.0, last_full_blocks=0, max_density=1.0),
    "the bound alone": BlockRule(alpha=0.0, sink_blocks=0, window_blocks=1, max_density=0.1),
    "more forced than the bound": BlockRule(
        alpha=0.0, sink_blocks=6, window_blocks=6, last_full_blocks=0, max_density=0.01
    ),
    "a share that binary fractions miss": BlockRule(alpha=0.0, max_density=0.14),  # 0.14 x 100 > 14
    "all tiles full": BlockRule(last_full_blocks=1000),
    "more sinks than blocks": BlockRule(sink_blocks=1000, window_blocks=1000),
}


def select(device: Device, mass: Mass, rule: BlockRule) -> BlockLists:
    """Run the kernel; what it does not write of a list stays -1, as in the reference's."""
    num_heads, num_blocks, _ = mass.shape
    unread = np.where(np.tri(num_blocks, dtype=np.bool_), mass, np.float32(np.nan))
    with Arrays(device) as arrays:
        indices = arrays.poisoned(mass.shape, np.int32)
        counts = arrays.poisoned((num_heads, num_blocks), np.int32)
        cut = arrays.poisoned((num_heads, num_blocks), np.uint8)
        block_select(
            device,
            mass=arrays.put(unread.astype(np.float32)),
            indices=indices,
            counts=counts,
            cut=cut,
            num_heads=num_heads,
            num_blocks=num_blocks,
            rule=rule,
        )
        flags = arrays.get(cut, (num_heads, num_blocks), np.uint8)
        assert set(np.unique(flags)) <= {0, 1}
        return BlockLists(
            arrays.get(indices, mass.shape, np.int32),
            arrays.get(counts, (num_heads, num_blocks), np.int32),
            flags.astype(np.bool_),
        )


def same(found: BlockLists, expected: BlockLists) -> bool:
    return (
        np.array_equal(found.indices, expected.indices)
        and np.array_equal(found.counts, expected.counts)
        and np.array_equal(found.cut, expected.cut)
    )


def steep(num_blocks: int, *, num_heads: int = 3, seed: int = 61) -> Mass:
    """Masses over many magnitudes, some rows wide, some narrow, a tenth of them zero."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.1, 8, (num_heads, num_blocks, 1))
    mass = np.exp(spread * rng.standard_normal((num_heads, num_blocks, num_blocks)))
    mass[rng.random(mass.shape) < 0.1] = 0
    return mass.astype(np.float32)


def tied(num_blocks: int, *, num_heads: int = 3, seed: int = 62) -> Mass:
    """Masses of four values only, so that a bound falls among equals."""
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([0, 0.25, 1, 3], np.float32), (num_heads, num_blocks, num_blocks))


@pytest.mark.parametrize("num_blocks", [1, 7, 32, 33, 131])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_lists_equal_the_reference(device: Device, rule: BlockRule, num_blocks: int) -> None:
    for mass in (steep(num_blocks), tied(num_blocks)):
        assert same(select(device, mass, rule), reference_select(mass, rule))


def test_long_rows_equal_the_reference(device: Device) -> None:
    rule = BlockRule(alpha=0.0, max_density=0.07)
    for mass in (steep(402, num_heads=1), tied(402, num_heads=1)):
        assert same(select(device, mass, rule), reference_select(mass, rule))


def test_a_mass_at_the_threshold_is_kept_and_one_bit_below_it_is_not(device: Device) -> None:
    mass = np.full((1, 9, 9), 0.7, dtype=np.float32)
    threshold = np.float32(0.1) * np.float32(0.7)
    mass[0, :, 2] = threshold
    mass[0, :, 3] = np.nextafter(threshold, np.float32(0))
    found = select(device, mass, PLAIN)
    assert found.row(0, 8).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert same(found, reference_select(mass, PLAIN))


@pytest.mark.parametrize("value", [0.0, 1e-42, 1.0, np.inf], ids=str)
def test_flat_rows_keep_the_lowest_blocks_of_a_bound(device: Device, value: float) -> None:
    rule = BlockRule(alpha=0.0 if value == 0 else 0.1, max_density=0.25)
    mass = np.full((1, 64, 64), value, dtype=np.float32)
    found = select(device, mass, rule)
    assert found.cut[0, 8:-2].all()
    assert same(found, reference_select(mass, rule))


@pytest.mark.parametrize("num_tokens", [127, 129, 2000])
def test_lists_of_structured_prompts_equal_the_reference(device: Device, num_tokens: int) -> None:
    q, k, _ = structured_qkv(num_tokens, seed=63)
    scores = block_score(q, block_mean(k, 128), block_tokens=128, scale=0.125)
    mass = block_mass(*scores).astype(np.float32)
    rule = BlockRule(sink_blocks=1, window_blocks=2, last_full_blocks=1)
    expected = reference_select(mass, rule)
    assert num_tokens < 200 or 0.2 < expected.density < 0.8
    assert same(select(device, mass, rule), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_blocks", [1024, 2048])
def test_lists_of_long_prompts_equal_the_reference(cuda_device: Device, num_blocks: int) -> None:
    for mass in (steep(num_blocks, num_heads=2), tied(num_blocks, num_heads=2)):
        for rule in (BlockRule(), BlockRule(alpha=0.0, max_density=0.07)):
            assert same(select(cuda_device, mass, rule), reference_select(mass, rule))


# ---- defects that the tests above must find ----

DEFECTS = {
    "above the threshold only": (">= threshold", "> threshold"),
    "ties to the upper index": ("__popc(tied & lanes_below)", "__popc(tied & ~lanes_below) - 1"),
    "all of a tie": (" && __popc(tied & lanes_below) < ties", ""),
    "no ties after the first 32 blocks": ("ties -= min(ties, __popc(tied));", "ties = 0;"),
    "a bound that rounds down": ("ceil(__dadd_rn", "floor(__dadd_rn"),
    "a bound without its allowance": ("__dadd_rn(share, -1e-9)", "share"),
    "a bound below eight": ("MIN_BOUND_BLOCKS = 8", "MIN_BOUND_BLOCKS = 1"),
    "forced blocks beside the bound": ("bound - forced", "bound"),
    "a window one too wide": (">= visible - window", ">= visible - window - 1"),
    "one full tile too few": ("num_blocks - last_full", "num_blocks - last_full + 1"),
    "blocks past the diagonal": ("visible = tile + 1", "visible = min(tile + 2, num_blocks)"),
    "a row at its bound called cut": ("candidates > room", "candidates >= room"),
    "the search stops early": ("bit > 0; bit >>= 1", "bit > 1 << 20; bit >>= 1"),
}


def found(edits: Sequence[Edit]) -> bool:
    """Whether a defect shows: the emulator refuses the run, or the lists differ."""
    device = EmulatedDevice(edits=edits)
    try:
        return not all(
            same(select(device, mass, rule), reference_select(mass, rule))
            for mass in (steep(131, num_heads=1), tied(131, num_heads=1))
            for rule in RULES.values()
        )
    except (KernelError, AssertionError):
        return True
    finally:
        device.close()


def test_without_a_defect_nothing_is_found() -> None:
    require_tool("g++")
    assert not found(())


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name: str) -> None:
    require_tool("g++")
    assert found([Edit("block_select.cu", *DEFECTS[name])])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("num_blocks", "rule", "message"),
    [
        (0, PLAIN, "num_blocks must be in"),
        (MAX_BLOCKS + 1, PLAIN, "num_blocks must be at most"),
        (1, BlockRule(window_blocks=0), "window_blocks must be at least 1"),
    ],
)
def test_impossible_calls_are_refused(num_blocks: int, rule: BlockRule, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        block_select(
            EmulatedDevice(),
            mass=0,
            indices=0,
            counts=0,
            cut=0,
            num_heads=1,
            num_blocks=num_blocks,
            rule=rule,
        )
