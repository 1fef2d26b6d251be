"""The tail scoring kernels against the reference, layer after layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kernels.device import Device, KernelSource
from kernels.errors import InvalidArgument, LaunchError
from kernels.ops.tail_score import scratch_bytes, span_of, tail_score
from kernels.reference import attention_rows, chunk_sum
from kernels.reference import tail_score as reference
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.kernels.inputs import structured_qkv
from tests.kernels.on_device import Arrays, from_bf16, to_bf16


@dataclass(frozen=True)
class Case:
    """A prompt of `num_prompt` tokens that `extra` tokens run after."""

    num_prompt: int = 300
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    positions: tuple[int, ...] = (290, 293, 299)
    extra: int = 0
    pool: int = 13
    chunk_tokens: int = 32
    layers: int = 2

    @property
    def num_rows(self) -> int:
        return self.num_prompt + self.extra


def last_positions(num_prompt: int, extra: int = 0) -> tuple[int, ...]:
    """The queries of a prompt: its last 9 tokens, or those of a copy and the prompt's last."""
    rows = num_prompt + extra
    return tuple(sorted({*range(max(0, rows - 8), rows), num_prompt - 1}))


def layer_rows(case: Case, seed: int) -> np.ndarray:
    """bf16 query and key heads of each row: [num_rows, num_heads + num_kv_heads, head_dim]."""
    q, k, _ = structured_qkv(
        case.num_rows,
        seed=seed,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
    )
    return to_bf16(np.concatenate([q, k]).swapaxes(0, 1))


@dataclass(frozen=True)
class Result:
    running_max: np.ndarray
    panel: np.ndarray


def run(device: Device, case: Case, layers: Sequence[np.ndarray]) -> Result:
    num_queries = len(case.positions)
    num_chunks = -(-case.num_prompt // case.chunk_tokens)
    width = layers[0].shape[1] * case.head_dim
    sizes = {"num_heads": case.num_heads, "num_queries": num_queries, "num_prompt": case.num_prompt}
    with Arrays(device) as arrays:
        positions = arrays.put(np.array(case.positions, dtype=np.int32))
        running_max = arrays.put(np.zeros((num_queries, case.num_prompt), dtype=np.float32))
        panel = arrays.put(np.zeros((num_queries, num_chunks), dtype=np.float32))
        scratch = arrays.poisoned(scratch_bytes(**sizes), np.uint8)
        for rows in layers:
            qkv = arrays.put(rows)
            tail_score(
                device,
                q=qkv,
                q_row_stride=width,
                q_rows=positions,
                k=qkv + 2 * case.num_heads * case.head_dim,
                k_row_stride=width,
                positions=positions,
                running_max=running_max,
                panel=panel,
                scratch=scratch,
                num_kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                chunk_tokens=case.chunk_tokens,
                pool_kernel=case.pool,
                scale=case.head_dim**-0.5,
                **sizes,
            )
        return Result(
            arrays.get(running_max, (num_queries, case.num_prompt), np.float32),
            arrays.get(panel, (num_queries, num_chunks), np.float32),
        )


def expected(case: Case, layers: Sequence[np.ndarray]) -> Result:
    positions = np.array(case.positions)
    running_max = np.zeros((positions.size, case.num_prompt), dtype=np.float32)
    panel = np.zeros((positions.size, -(-case.num_prompt // case.chunk_tokens)), dtype=np.float32)
    for rows in layers:
        heads = from_bf16(rows).swapaxes(0, 1)
        queries = heads[: case.num_heads, positions]
        keys = np.ascontiguousarray(heads[case.num_heads :, : case.num_prompt])
        mean = reference(
            queries,
            keys,
            positions,
            running_max,
            scale=case.head_dim**-0.5,
            pool_kernel=case.pool,
        )
        panel += chunk_sum(mean, case.chunk_tokens)
    return Result(running_max, panel)


def is_right(device: Device, case: Case) -> bool:
    layers = [layer_rows(case, seed=70 + layer) for layer in range(case.layers)]
    got, wanted = run(device, case, layers), expected(case, layers)
    # A logit of up to 30 carries 2^-24 of itself per sum and rounding: 1e-5 of its power at most,
    # on either side.
    return bool(
        np.allclose(got.running_max, wanted.running_max, rtol=1e-4, atol=1e-9)
        and np.allclose(got.panel, wanted.panel, rtol=1e-4, atol=1e-8)
    )


@pytest.mark.parametrize("num_prompt", [1, 127, 128, 129, 1_100])
def test_scores_and_panel_equal_the_references(device: Device, num_prompt: int) -> None:
    assert is_right(device, Case(num_prompt, positions=last_positions(num_prompt)))


@pytest.mark.gpu
@pytest.mark.parametrize("num_prompt", [4_095, 8_193])
def test_scores_of_longer_prompts(cuda_device: Device, num_prompt: int) -> None:
    assert is_right(cuda_device, Case(num_prompt, positions=last_positions(num_prompt)))


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(2, 2, 128), (6, 2, 64), (8, 2, 128), (2, 1, 256)]
)
def test_any_group_of_query_heads_and_any_head_width(
    device: Device, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    positions = last_positions(530)
    assert is_right(device, Case(530, num_heads, num_kv_heads, head_dim, positions, layers=1))


def test_queries_of_a_copy_see_the_whole_prompt_and_not_the_copy(device: Device) -> None:
    case = Case(520, positions=last_positions(520, extra=64), extra=64)
    assert case.positions[0] == 519 and case.positions[1] > 520
    assert is_right(device, case)


def test_look_ahead_makes_72_queries(device: Device) -> None:
    positions = tuple(range(200, 272))
    assert is_right(device, Case(208, positions=positions, extra=64, layers=1))


def test_keys_after_a_query_get_exact_zeros(device: Device) -> None:
    case = Case(700, positions=(0, 3, 520), layers=1)
    result = run(device, case, [layer_rows(case, seed=72)])
    for query, position in enumerate(case.positions):
        assert (result.running_max[query, : position + 7] > 0).all()
        assert not result.running_max[query, position + 7 :].any()
    assert is_right(device, case)


@pytest.mark.parametrize("pool", [1, 3, 11, 63, 1_017])
def test_pool_may_have_any_odd_width(device: Device, pool: int) -> None:
    assert is_right(device, Case(1_050, positions=(1_049,), pool=pool, layers=1))


@pytest.mark.parametrize("chunk_tokens", [1, 48, 33, 600, 1_030, 9_999])
def test_chunks_may_have_any_length(device: Device, chunk_tokens: int) -> None:
    assert is_right(device, Case(2_100, positions=(2_099,), chunk_tokens=chunk_tokens, layers=1))


def test_spans_hold_whole_chunks_and_whole_vectors() -> None:
    for chunk_tokens in (1, 3, 32, 48, 1_000, 1_023, 1_024, 5_000):
        span = span_of(chunk_tokens, 13)
        assert span % chunk_tokens == 0 and span % 4 == 0
        assert span <= 1_024 - 16 or span <= 4 * chunk_tokens


def test_panel_rows_sum_to_one_a_layer(device: Device) -> None:
    case = Case()
    panel = run(device, case, [layer_rows(case, seed=s) for s in (73, 74)]).panel
    np.testing.assert_allclose(panel.sum(axis=1), 2.0, rtol=1e-5)


def test_nan_in_one_key_shows_in_every_score_that_saw_it(device: Device) -> None:
    case = Case(layers=1)
    broken, sound = layer_rows(case, seed=75), layer_rows(case, seed=76)
    broken[200, case.num_heads] = to_bf16(np.full(case.head_dim, np.nan))
    assert np.isnan(run(device, case, [broken, sound]).running_max).all()


def test_results_do_not_depend_on_the_order_of_threads() -> None:
    case = Case(140, positions=(70, 139), layers=1)
    assert is_right(EmulatedDevice(check_races=True), case)


class Planted(EmulatedDevice):
    """Plants defects in one of the kernels; the others are built only once for all tests."""

    def __init__(self, entry: str, *edits: tuple[str, str]) -> None:
        super().__init__()
        self._entry = entry
        self._planted = tuple(Edit("tail_score.cu", old, new) for old, new in edits)

    def launch(self, source: KernelSource, *args: Any, **kwargs: Any) -> None:
        self._edits = self._planted if source.entry == self._entry else ()
        super().launch(source, *args, **kwargs)


POOL_LATER = (
    ("float mass[KEYS] = {},", "float top[KEYS] = {}, mass[KEYS] = {},"),
    ("mass[i] += p[i];", "mass[i] += p[i], top[i] = fmaxf(top[i], p[i]);"),
    ("make_float4(p[0], p[1], p[2], p[3])", "make_float4(top[0], top[1], top[2], top[3])"),
)
NO_RESCALE = (
    "sum = sum * exp2_approx(largest - top) + exp2_approx(first",
    "sum = sum + exp2_approx(first",
)


@pytest.mark.parametrize(
    ("entry", "edits"),
    [
        ("tail_logits", [("(kv_head) * group * HEAD_DIM", "(kv_head) * HEAD_DIM")]),
        ("tail_logits", [("min(key + 8, num_prompt - 1)", "(key + 8)")]),
        ("tail_logits", [("key + 8 <= last_key[tile][c]", "true")]),
        ("tail_logits", [NO_RESCALE]),
        ("tail_pool", POOL_LATER),
        ("tail_pool", [("mass[i] /= static_cast<float>(num_heads);", "")]),
        ("tail_pool", [("if (key + i < limit)", "if (key + i + 1 < limit)")]),
    ],
    ids=[
        "wrong map of groups",
        "read past the end",
        "not causal",
        "no rescale",
        "pool after the maximum",
        "panel not divided",
        "unwritten tail",
    ],
)
def test_defect_is_seen(entry: str, edits: Sequence[tuple[str, str]]) -> None:
    case = Case(297, positions=(150, 290, 296), layers=1)
    with suppress(LaunchError):  # the emulated device refuses the read past the end itself
        assert not is_right(Planted(entry, *edits), case)


def test_reference_rows_of_the_inputs_are_neither_flat_nor_spikes() -> None:
    """So that the tests above see pools, maxima and masks."""
    case = Case()
    heads = from_bf16(layer_rows(case, seed=70)).swapaxes(0, 1)
    positions = np.array(case.positions)
    rows = attention_rows(heads[:4, positions], heads[4:, :300], positions, scale=0.125)
    assert 0.005 < rows.max(axis=-1).mean() < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_kernel": 4}, "pool_kernel must be odd, at most 1017, got 4"),
        ({"num_queries": 73}, "num_queries must be at most 72, got 73"),
        ({"num_heads": 5}, "num_heads must be whole groups of KV heads, got 5"),
    ],
)
def test_what_has_no_kernel_is_refused(
    device: Device, change: dict[str, int], message: str
) -> None:
    pointers = ("q", "q_rows", "k", "positions", "running_max", "panel", "scratch")
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "num_queries": 1, "num_prompt": 9}
    strides = {"q_row_stride": 512, "k_row_stride": 512, "chunk_tokens": 32, "pool_kernel": 13}
    with pytest.raises(InvalidArgument, match=message):
        tail_score(
            device, **dict.fromkeys(pointers, 16), **{**sizes, **strides, **change}, scale=1.0
        )
