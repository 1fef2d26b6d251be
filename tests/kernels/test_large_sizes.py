"""Kernels whose elements number past 2^31, on a GPU: the last row is as right as the first.

Inputs are one byte repeated, so that nothing large crosses to the host.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.device import Device
from kernels.ops.embed import embed
from kernels.ops.rmsnorm import rmsnorm
from kernels.ops.silu_mul import silu_mul
from tests.kernels.on_device import Arrays, from_bf16, to_bf16

pytestmark = pytest.mark.gpu

NUM_ROWS = 262_147
HIDDEN = 8_192
BYTE = 0x3F
BF16 = float(from_bf16(np.array([0x3F3F], np.uint16))[0])  # what two such bytes are: 0.746
EDGES = (0, 1, NUM_ROWS - 2, NUM_ROWS - 1)


def filled(arrays: Arrays, num_bytes: int) -> int:
    address = arrays.poisoned(num_bytes, np.uint8)
    arrays.device.fill(address, num_bytes, BYTE)
    return address


def test_norm_of_equal_values_is_one_in_every_row(cuda_device: Device) -> None:
    with Arrays(cuda_device) as arrays:
        out = arrays.poisoned((NUM_ROWS, HIDDEN), np.uint16)
        rmsnorm(
            cuda_device,
            x=filled(arrays, 4 * NUM_ROWS * HIDDEN),
            weight=arrays.put(np.ones(HIDDEN, np.float32)),
            out=out,
            num_rows=NUM_ROWS,
            hidden=HIDDEN,
            epsilon=0.0,
        )
        for row in EDGES:
            got = from_bf16(arrays.get(out + 2 * row * HIDDEN, HIDDEN, np.uint16))
            assert (got == 1.0).all()


def test_gate_reaches_the_last_row(cuda_device: Device) -> None:
    with Arrays(cuda_device) as arrays:
        gate_up = filled(arrays, 2 * NUM_ROWS * 2 * HIDDEN)
        silu_mul(cuda_device, gate_up=gate_up, num_rows=NUM_ROWS, ffn=HIDDEN)
        for row in EDGES:
            got = arrays.get(gate_up + 2 * row * 2 * HIDDEN, 2 * HIDDEN, np.uint16)
            expected = BF16 / (1 + np.exp(-BF16)) * BF16
            np.testing.assert_allclose(from_bf16(got[:HIDDEN]), expected, rtol=2.0**-8)
            assert (from_bf16(got[HIDDEN:]) == BF16).all()


def test_embedding_reaches_the_last_row(cuda_device: Device) -> None:
    table = to_bf16(np.random.default_rng(67).standard_normal((3, HIDDEN)))
    with Arrays(cuda_device) as arrays:
        out = arrays.poisoned((NUM_ROWS, HIDDEN), np.float32)
        embed(
            cuda_device,
            table=arrays.put(table),
            ids=arrays.put((np.arange(NUM_ROWS) % 3).astype(np.int32)),
            out=out,
            num_tokens=NUM_ROWS,
            hidden=HIDDEN,
            vocab_size=3,
        )
        for row in EDGES:
            got = arrays.get(out + 4 * row * HIDDEN, HIDDEN, np.float32)
            assert np.array_equal(got, from_bf16(table[row % 3]))
