"""Dequantisation against the gguf package: bit for bit its value, rounded to bf16."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from kernels.device import Device
from kernels.errors import InvalidArgument
from kernels.ops.dequant import DEQUANT_TYPES, dequant
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.on_device import Arrays, to_bf16

HALVES = {"Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(dtype: str, num_blocks: int) -> np.ndarray:
    """uint8 [num_blocks, bytes]: every bit random but for the scales, which are finite numbers."""
    rng = np.random.default_rng(65)
    kind = DEQUANT_TYPES[dtype]
    if dtype == "F32":
        return rng.standard_normal((num_blocks, 1)).astype(np.float32).view(np.uint8)
    if dtype == "F16":
        return rng.standard_normal((num_blocks, 1)).astype(np.float16).view(np.uint8)
    if dtype == "BF16":
        return to_bf16(rng.standard_normal((num_blocks, 1))).view(np.uint8)
    blocks = rng.integers(0, 256, (num_blocks, kind.num_bytes)).astype(np.uint8)
    for offset in HALVES[dtype]:
        scales = (rng.standard_normal(num_blocks) * 0.01).astype(np.float16)
        scales[::5] = np.float16(3e-6)  # below the normal range of a half
        blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return blocks


def mismatches(device: Device, dtype: str, num_blocks: int) -> int:
    kind = DEQUANT_TYPES[dtype]
    blocks = random_blocks(dtype, num_blocks)
    num_values = num_blocks * kind.values
    with Arrays(device) as arrays:
        target = arrays.poisoned(num_values, np.uint16)
        dequant(device, dtype, arrays.put(blocks), target, num_values)
        got = arrays.get(target, num_values, np.uint16)
    exact = dequantize(blocks.reshape(1, -1), GGMLQuantizationType[dtype])
    return int((got != to_bf16(exact.reshape(-1))).sum())


@pytest.mark.parametrize("dtype", DEQUANT_TYPES)
def test_values_are_the_files_rounded_to_bf16(device: Device, dtype: str) -> None:
    per_tile = 8192 // DEQUANT_TYPES[dtype].values
    for num_blocks in (1, 3, per_tile, 2 * per_tile + 1):
        assert mismatches(device, dtype, num_blocks) == 0


@pytest.mark.parametrize(
    ("dtype", "old", "new"),
    [
        ("Q6_K", "static_cast<int>(q) - 32", "static_cast<int>(q) - 31"),
        ("Q4_K", "(packed[group] >> 6 << 4)", "(packed[group] >> 6 << 3)"),
        ("Q8_0", "if (last < num_bytes)", "if (last + 1 < num_bytes)"),
    ],
    ids=["offset", "upper bits of a minimum", "last bytes left out"],
)
def test_defect_is_seen(dtype: str, old: str, new: str) -> None:
    device = EmulatedDevice(edits=[Edit("dequant.cu", old, new)])
    assert mismatches(device, dtype, 5) > 0


@pytest.mark.parametrize(
    ("dtype", "num_values", "message"),
    [
        ("Q2_K", 256, "dtype must be one of F32, F16"),
        ("Q4_K", 128, "num_values must be whole blocks of 256, at least 1, got 128"),
        ("F32", 0, "num_values must be whole blocks of 1, at least 1, got 0"),
    ],
)
def test_what_is_no_block_of_a_known_type_is_refused(
    device: Device, dtype: str, num_values: int, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        dequant(device, dtype, 16, 16, num_values)
