"""The embedding kernel against plain indexing: exact."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.device import Device
from kernels.errors import InvalidArgument
from kernels.ops.embed import embed
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.on_device import Arrays, from_bf16, to_bf16

VOCAB = 50


def look_up(device: Device, num_tokens: int, hidden: int, bad_id: int | None = None) -> np.ndarray:
    """Embed random ids; True where the row equals the table's."""
    rng = np.random.default_rng(60)
    table = to_bf16(rng.standard_normal((VOCAB, hidden)))
    ids = rng.integers(0, VOCAB, num_tokens).astype(np.int32)
    ids[-1] = VOCAB - 1 if bad_id is None else bad_id
    with Arrays(device) as arrays:
        out = arrays.poisoned((num_tokens, hidden), np.float32)
        embed(
            device,
            table=arrays.put(table),
            ids=arrays.put(ids),
            out=out,
            num_tokens=num_tokens,
            hidden=hidden,
            vocab_size=VOCAB,
        )
        got = arrays.get(out, (num_tokens, hidden), np.float32)
    expected = from_bf16(table)[np.clip(ids, 0, VOCAB - 1)]
    if bad_id is not None:
        assert np.isnan(got[-1]).all()
        got[-1] = expected[-1]
    return np.asarray((got == expected).all(axis=1))


@pytest.mark.parametrize("hidden", [64, 192, 1024, 2056])
@pytest.mark.parametrize("num_tokens", [1, 5, 8])
def test_each_row_is_the_tables_row_of_its_id(device: Device, num_tokens: int, hidden: int) -> None:
    assert look_up(device, num_tokens, hidden).all()


@pytest.mark.parametrize("bad_id", [-1, VOCAB])
def test_id_outside_the_table_gives_nan_and_reads_nothing(device: Device, bad_id: int) -> None:
    assert look_up(device, 7, 64, bad_id).all()


def test_unwritten_tail_is_seen() -> None:
    edit = Edit("embed.cu", "if (first + r >= num_tokens) break;", "if (r == 3) break;")
    assert not look_up(EmulatedDevice(edits=[edit]), 8, 64).all()


def test_width_of_no_whole_vectors_is_refused(device: Device) -> None:
    with pytest.raises(InvalidArgument, match="hidden must be a multiple of 8, got 60"):
        embed(device, table=16, ids=16, out=16, num_tokens=1, hidden=60, vocab_size=1)
