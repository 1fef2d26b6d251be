"""Products by cuBLASLt: what it is told, on a stand-in that computes column-major in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kernels.errors import InvalidArgument, KernelError
from tests.kernels.on_device import from_bf16, to_bf16
from tests.tools import require_package

if TYPE_CHECKING:
    from kernels.gemm import Gemm

BF16, F32 = 14, 0


class Lt:
    """`nvmath.bindings.cublasLt` of the calls that plans and products make."""

    MatmulDescAttribute = SimpleNamespace(TRANSA="TRANSA", TRANSB="TRANSB")
    names = ["MAX_WORKSPACE_BYTES", "REDUCTION_SCHEME_MASK"]
    names += [f"MIN_ALIGNMENT_{operand}_BYTES" for operand in "ABCD"]
    MatmulPreferenceAttribute = SimpleNamespace(**{name: name for name in names})

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}
        self.preferences: list[dict[str, int]] = []
        self.algorithms, self.state = 1, 0

    def _keep(self, made: Any) -> int:
        self.kept[len(self.kept) + 1] = made
        return len(self.kept)

    def create(self) -> int:
        return 77

    def get_matmul_desc_attribute_dtype(self, attribute: str) -> type:
        return np.int32

    def get_matmul_preference_attribute_dtype(self, attribute: str) -> type:
        return np.uint64 if attribute == "MAX_WORKSPACE_BYTES" else np.uint32

    def matmul_desc_create(self, compute: int, scale: int) -> int:
        assert (int(compute), scale) == (68, F32)  # float32 sums and scalars
        return self._keep({})

    def matmul_desc_set_attribute(self, desc: int, name: str, at: int, size: int) -> None:
        self.kept[desc][name] = int.from_bytes(ctypes.string_at(at, size), "little")

    def matrix_layout_create(self, kind: int, rows: int, columns: int, stride: int) -> int:
        return self._keep((kind, rows, columns, stride))

    def matrix_layout_destroy(self, layout: int) -> None:
        self.kept[layout] = None

    matmul_desc_destroy = matrix_layout_destroy

    def destroy(self, handle: int) -> None:
        assert handle == 77

    def matmul_preference_create(self) -> int:
        return self._keep({})

    def matmul_preference_set_attribute(self, it: int, name: str, at: int, size: int) -> None:
        self.kept[it][name] = int.from_bytes(ctypes.string_at(at, size), "little")

    def matmul_preference_destroy(self, preference: int) -> None:
        self.preferences.append(self.kept[preference])
        self.kept[preference] = None

    def MatmulHeuristicResult(self, size: int) -> SimpleNamespace:
        return SimpleNamespace(ptr=4_242, state=self.state)

    def matmul_algo_get_heuristic(self, *arguments: int) -> None:
        ctypes.c_int32.from_address(arguments[-1]).value = self.algorithms

    def matmul(self, *arguments: int) -> None:
        _, desc, alpha, a, la, b, lb, beta, c, lc, d, ld, algorithm, _, _, stream = arguments
        assert algorithm == 4_242 and stream == 5 and c == d and lc == ld
        assert self.kept[desc] == {"TRANSA": 1, "TRANSB": 0}
        one, added = (ctypes.c_float.from_address(at).value for at in (alpha, beta))
        product = self._view(a, la)[1].T @ self._view(b, lb)[1] * one
        out, before = self._view(d, ld)
        result = product + added * before
        out[:] = result if self.kept[ld][0] == F32 else to_bf16(result)

    def _view(self, at: int, layout: int) -> tuple[np.ndarray, np.ndarray]:
        kind, rows, columns, stride = self.kept[layout]
        length = (columns - 1) * stride + rows
        c_type, dtype = (ctypes.c_float, np.float32) if kind == F32 else (ctypes.c_uint16, "u2")
        flat = np.ctypeslib.as_array((c_type * length).from_address(at)).view(dtype)
        steps = (flat.itemsize, stride * flat.itemsize)
        raw = np.lib.stride_tricks.as_strided(flat, (rows, columns), steps)
        return raw, (raw if kind == F32 else from_bf16(raw)).astype(np.float64)


@pytest.fixture
def lt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lt]:
    require_package("nvmath.bindings.cublasLt", "nvmath-python")
    made = Lt()
    monkeypatch.setattr("kernels.gemm.lt", made)
    yield made


@pytest.fixture
def gemm(lt: Lt) -> Gemm:
    from kernels.gemm import Gemm

    return Gemm(5, 0)


@pytest.mark.parametrize("accumulate_f32", [False, True])
def test_product_reads_and_writes_rows_at_their_strides(gemm: Gemm, accumulate_f32: bool) -> None:
    m, n, k, ldx, ldy = 5, 7, 3, 9, 11
    rng = np.random.default_rng(1)
    x, w = (to_bf16(rng.standard_normal(shape)) for shape in ((m, ldx), (n, k)))
    start = rng.standard_normal((m, ldy), np.float32)
    y = start.copy() if accumulate_f32 else to_bf16(start)
    before = y.copy()
    gemm.run(
        x=x.ctypes.data, w=w.ctypes.data, y=y.ctypes.data,
        m=m, n=n, k=k, ldx=ldx, ldy=ldy, accumulate_f32=accumulate_f32,
    )  # fmt: skip
    exact = from_bf16(x)[:, :k].astype(np.float64) @ from_bf16(w).T
    if accumulate_f32:
        assert np.abs(y[:, :n] - (start[:, :n] + exact)).max() < 1e-6  # one float32 rounding
    else:
        assert np.array_equal(y[:, :n], to_bf16(exact))
    assert np.array_equal(y[:, n:], before[:, n:])


def _run(gemm: Gemm, **changed: Any) -> None:
    x, w, y = (np.zeros(64, np.uint16) for _ in range(3))
    sizes: dict[str, Any] = {"m": 2, "n": 2, "k": 2, "ldx": 2, "ldy": 2, "accumulate_f32": False}
    at = {"x": x.ctypes.data, "w": w.ctypes.data, "y": y.ctypes.data}
    gemm.run(**{**at, **sizes, **changed})


def test_plan_states_workspace_alignment_and_a_fixed_order_of_sums(lt: Lt, gemm: Gemm) -> None:
    aligned = np.zeros(4_096, np.uint8)
    base = aligned.ctypes.data + -aligned.ctypes.data % 512
    _run(gemm, w=base, x=base + 1_024 + 64, y=base + 2_048 + 2)
    assert lt.preferences == [
        {
            "MAX_WORKSPACE_BYTES": 32 << 20,
            "REDUCTION_SCHEME_MASK": 2,
            "MIN_ALIGNMENT_A_BYTES": 256,
            "MIN_ALIGNMENT_B_BYTES": 64,
            "MIN_ALIGNMENT_C_BYTES": 2,
            "MIN_ALIGNMENT_D_BYTES": 2,
        }
    ]


def test_same_shape_is_planned_once(lt: Lt, gemm: Gemm) -> None:
    x, w, y = (np.zeros(64, np.uint16) for _ in range(3))
    at = {"x": x.ctypes.data, "w": w.ctypes.data, "y": y.ctypes.data}
    _run(gemm, **at)
    _run(gemm, **at)
    assert len(lt.preferences) == 1
    _run(gemm, **at, m=3)
    assert len(lt.preferences) == 2


def test_plans_of_many_lengths_are_given_back(
    lt: Lt, gemm: Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.gemm.MAX_PLANS", 3)
    for m in range(1, 20):
        _run(gemm, m=m)
    held = [made for made in lt.kept.values() if isinstance(made, tuple)]  # layouts
    assert 0 < len(held) <= 3 * 3


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"m": 0}, "m must be"), ({"k": 3}, "ldx must be"), ({"n": 3}, "ldy must be")],
)
def test_size_out_of_range_is_named(gemm: Gemm, changed: dict[str, int], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        _run(gemm, **changed)


@pytest.mark.parametrize(("algorithms", "state"), [(0, 0), (1, 15)])
def test_shape_without_a_valid_algorithm_is_refused_and_leaves_nothing_behind(
    lt: Lt, gemm: Gemm, algorithms: int, state: int
) -> None:
    lt.algorithms, lt.state = algorithms, state
    with pytest.raises(InvalidArgument, match="no algorithm"):
        _run(gemm)
    assert set(lt.kept.values()) == {None}


@pytest.mark.parametrize(
    "refused",
    [
        "matmul_desc_create",
        "matmul_desc_set_attribute",
        "matrix_layout_create",
        "matmul_preference_create",
        "matmul_preference_set_attribute",
        "matmul_algo_get_heuristic",
        "matmul",
    ],
)
def test_refusal_of_the_library_carries_the_shape_and_leaves_nothing_behind(
    lt: Lt, gemm: Gemm, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    from nvmath.bindings.cublasLt import cuBLASLtError

    def refuse(*arguments: int) -> None:
        raise cuBLASLtError(7)

    monkeypatch.setattr(lt, refused, refuse)
    with pytest.raises(KernelError, match="m=2"):
        _run(gemm)
    gemm.close()
    assert set(lt.kept.values()) <= {None}


@pytest.mark.parametrize("refused", ["matrix_layout_destroy", "matmul_desc_destroy", "destroy"])
def test_close_gives_back_the_rest_when_one_part_is_refused(
    lt: Lt, gemm: Gemm, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    from nvmath.bindings.cublasLt import cuBLASLtError

    given_back: list[int] = []

    def refuse(handle: int) -> None:
        raise cuBLASLtError(7)

    for name in ("matrix_layout_destroy", "matmul_desc_destroy", "destroy"):
        monkeypatch.setattr(lt, name, refuse if name == refused else given_back.append)
    _run(gemm)
    with pytest.raises(KernelError, match="closing"):
        gemm.close()
    num_parts = {"matrix_layout_destroy": 3, "matmul_desc_destroy": 1, "destroy": 1}  # of one plan
    assert len(given_back) == sum(num_parts.values()) - num_parts[refused]
