"""The chunk kernel against the reference: means over queries and over each chunk's real tokens."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from kernels.device import Device
from kernels.errors import InvalidArgument, LaunchError
from kernels.ops.chunk_reduce import chunk_reduce
from kernels.reference import chunk_mean
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.on_device import Arrays


def reduced(device: Device, running_max: np.ndarray, chunk_tokens: int) -> np.ndarray:
    num_queries, num_prompt = running_max.shape
    num_chunks = -(-num_prompt // chunk_tokens)
    with Arrays(device) as arrays:
        out = arrays.poisoned(num_chunks, np.float32)
        chunk_reduce(
            device,
            running_max=arrays.put(running_max),
            out=out,
            num_queries=num_queries,
            num_prompt=num_prompt,
            chunk_tokens=chunk_tokens,
        )
        return arrays.get(out, num_chunks, np.float32)


def drawn(num_queries: int, num_prompt: int) -> np.ndarray:
    return np.random.default_rng(64).random((num_queries, num_prompt), dtype=np.float32)


def is_right(device: Device, num_queries: int, num_prompt: int, chunk_tokens: int) -> bool:
    running_max = drawn(num_queries, num_prompt)
    got = reduced(device, running_max, chunk_tokens)
    expected = chunk_mean(running_max.mean(axis=0), chunk_tokens)
    # Sums of under 2^13 positive fp32 numbers, a lane's and then five: 300 roundings of 2^-24.
    return bool(np.allclose(got, expected, rtol=2e-5, atol=0))


@pytest.mark.parametrize("num_prompt", [1, 127, 128, 129, 1_100])
def test_chunks_are_means_over_queries_and_tokens(device: Device, num_prompt: int) -> None:
    assert is_right(device, 9, num_prompt, 32)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 33, 500, 5_000])
def test_chunks_may_have_any_length(device: Device, chunk_tokens: int) -> None:
    assert is_right(device, 2, 500, chunk_tokens)


def test_nan_shows_in_its_chunk_alone(device: Device) -> None:
    running_max = drawn(3, 100)
    running_max[1, 40] = np.nan
    assert np.isnan(reduced(device, running_max, 32)).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rest < chunk_tokens ? static_cast<int>(rest) : chunk_tokens", "chunk_tokens"),
        ("if (begin >= num_prompt) return;", "if (chunk >= num_prompt / chunk_tokens) return;"),
    ],
    ids=["read past the end", "unwritten tail"],
)
def test_defect_is_seen(old: str, new: str) -> None:
    device = EmulatedDevice(edits=[Edit("chunk_reduce.cu", old, new)])
    with suppress(LaunchError):  # the emulated device refuses the read past the end itself
        assert not is_right(device, 2, 500, 48)


def test_chunk_of_nothing_is_refused(device: Device) -> None:
    with pytest.raises(InvalidArgument, match="chunk_tokens must be in"):
        chunk_reduce(device, running_max=16, out=16, num_queries=1, num_prompt=1, chunk_tokens=0)
