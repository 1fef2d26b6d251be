"""The block mean kernel against float64, to the rounding of its bf16 output."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.device import Device
from kernels.errors import InvalidArgument
from kernels.ops.block_mean import block_mean
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.on_device import Arrays, from_bf16, to_bf16

BLOCK = 128


def worst_error(
    device: Device, num_tokens: int, *, num_kv_heads: int = 2, head_dim: int = 64
) -> float:
    """Largest error of a mean, as a share of what rounding may move it by."""
    rng = np.random.default_rng(63)
    shape = (2, num_kv_heads, -(-num_tokens // BLOCK), head_dim)
    # As in the QKV buffer: 3 query heads stand before the keys, the values after them.
    before, width = 3 * head_dim, num_kv_heads * head_dim
    qkv = to_bf16(1 + rng.standard_normal((num_tokens, before + 2 * width)))
    with Arrays(device) as arrays:
        rows = arrays.put(qkv)
        means = arrays.poisoned(shape, np.uint16)
        block_mean(
            device,
            k=rows + 2 * before,
            v=rows + 2 * (before + width),
            row_stride=before + 2 * width,
            k_mean=means,
            v_mean=means + 2 * int(np.prod(shape[1:])),
            num_tokens=num_tokens,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
        got = from_bf16(arrays.get(means, shape, np.uint16))
    heads = from_bf16(qkv[:, before:]).reshape(num_tokens, 2, num_kv_heads, head_dim)
    heads = np.ascontiguousarray(heads.transpose(1, 2, 0, 3))
    exact = np.stack(
        [
            np.stack(
                [
                    heads[part, :, j * BLOCK : (j + 1) * BLOCK].astype(np.float64).mean(axis=1)
                    for j in range(shape[2])
                ],
                axis=1,
            )
            for part in range(2)
        ]
    )
    # bf16: 2^-8 of the value. fp32 sums of 128 values of about 2: 128 roundings of 2^-24 x 256.
    allowed = 2.0**-8 * np.abs(exact) + 2e-5
    return float(np.nan_to_num(np.abs(got - exact) / allowed, nan=np.inf).max())


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 300])
def test_means_are_over_the_real_tokens_of_each_block(device: Device, num_tokens: int) -> None:
    assert worst_error(device, num_tokens) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [4_095, 8_193])
def test_means_of_longer_prompts(cuda_device: Device, num_tokens: int) -> None:
    assert worst_error(cuda_device, num_tokens, num_kv_heads=8, head_dim=128) <= 1


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 64), (3, 128), (2, 256), (8, 128)])
def test_means_of_any_number_and_width_of_heads(
    device: Device, num_kv_heads: int, head_dim: int
) -> None:
    assert worst_error(device, 130, num_kv_heads=num_kv_heads, head_dim=head_dim) <= 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sum / static_cast<float>(tokens)", "sum / static_cast<float>(BLOCK_TOKENS)"),
        ("mine / head_dim) * gridDim.y", "mine / head_dim) * 1"),
        ("(blockIdx.z == 0 ? k : v)", "(blockIdx.z == 0 ? k : k)"),
    ],
    ids=["short block by 128", "wrong head", "keys for values"],
)
def test_defect_is_seen(old: str, new: str) -> None:
    device = EmulatedDevice(edits=[Edit("block_mean.cu", old, new)])
    assert worst_error(device, 129) > 1


def test_unaligned_keys_are_refused(device: Device) -> None:
    with pytest.raises(InvalidArgument, match="k must be on a multiple of 16 bytes"):
        block_mean(
            device,
            k=24,
            v=32,
            row_stride=64,
            k_mean=32,
            v_mean=32,
            num_tokens=1,
            num_kv_heads=1,
            head_dim=64,
        )
