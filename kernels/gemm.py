"""Matrix products by cuBLASLt on raw pointers: Y = X W^T, or Y += X W^T for the residual.

`CudaDevice.gemm` is its only caller. One plan a shape: descriptors and the first algorithm that
cuBLASLt's heuristic proposes (measured within 1.2 % of the best of eight), kept until there are
`MAX_PLANS`. cuBLASLt is column-major, so the row-major Y[m, n] is written as the column-major n x m
matrix W^T X. Refuses shapes for which cuBLASLt has no algorithm. The tensor front end of
nvmath-python is not used: it owns its operands and plans per call.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvmath.bindings import cublas
from nvmath.bindings import cublasLt as lt

from kernels.errors import InvalidArgument, KernelError

WORKSPACE_BYTES = 32 << 20  # what cuBLAS itself takes on Hopper
MAX_PLANS = 1024  # a pass needs a dozen, and each new prompt length brings its own
_FAILURES = (RuntimeError, lt.cuBLASLtError)  # of loading the library, of its calls
_FLOAT32, _BFLOAT16 = 0, 14  # cudaDataType_t
_REDUCE_IN_FLOAT32 = 2  # cublasLtReductionScheme_t: partial sums in the workspace, fixed order
_SCALARS = {value: np.array([value], np.float32) for value in (0.0, 1.0)}


@dataclass(frozen=True)
class Shape:
    """What a plan depends on; sizes and strides in elements, row-major.

    Attributes:
        m: rows of X and Y.
        n: rows of W, columns of Y.
        k: columns of X and W.
        ldx: from one row of X to the next.
        ldy: from one row of Y to the next.
        accumulate_f32: Y is float32 and is added to; else bf16 and overwritten.
        alignments: bytes to which the addresses of W, X and Y are aligned, at most 256.
    """

    m: int
    n: int
    k: int
    ldx: int
    ldy: int
    accumulate_f32: bool
    alignments: tuple[int, int, int]


@dataclass(frozen=True)
class _Plan:
    desc: int
    w: int
    x: int
    y: int
    algorithm: Any  # keeps the record alive that `algorithm.ptr` names
    beta: int


class Gemm:
    """cuBLASLt on one stream.

    Args:
        stream: the stream's handle.
        workspace: device address of `WORKSPACE_BYTES` that no other work uses.
    """

    def __init__(self, stream: int, workspace: int) -> None:
        self._stream, self._workspace = stream, workspace
        self._plans: dict[Shape, _Plan] = {}
        try:
            self._handle = int(lt.create())
        except _FAILURES as error:
            raise KernelError("gemm", f"cuBLASLt cannot be used: {error}") from error

    def run(
        self,
        *,
        x: int,
        w: int,
        y: int,
        m: int,
        n: int,
        k: int,
        ldx: int,
        ldy: int,
        accumulate_f32: bool,
    ) -> None:
        """Queue one product; arguments as in `kernels.device.Device.gemm`.

        Raises:
            InvalidArgument: a size or stride is out of range, or there is no algorithm for them.
            KernelError: cuBLASLt refused the call.
        """
        shape = Shape(m, n, k, ldx, ldy, accumulate_f32, (_aligned(w), _aligned(x), _aligned(y)))
        plan = self._plans.get(shape)
        if plan is None:
            plan = self._plans[shape] = self._plan(shape)
        try:
            lt.matmul(
                self._handle,
                plan.desc,
                _SCALARS[1.0].ctypes.data,
                w,
                plan.w,
                x,
                plan.x,
                plan.beta,
                y,
                plan.y,
                y,
                plan.y,
                plan.algorithm.ptr,
                self._workspace,
                WORKSPACE_BYTES,
                self._stream,
            )
        except _FAILURES as error:
            raise KernelError("gemm", f"{shape}: {error}") from error

    def close(self) -> None:
        """Give the plans and the handle back.

        Raises:
            KernelError: cuBLASLt refused to take one; the others are given back all the same.
        """
        try:
            with ExitStack() as stack:
                stack.callback(lt.destroy, self._handle)
                stack.callback(self._forget_plans)
        except _FAILURES as error:
            raise KernelError("gemm", f"closing failed: {error}") from error

    def _forget_plans(self) -> None:
        with ExitStack() as stack:
            for plan in self._plans.values():
                stack.callback(lt.matmul_desc_destroy, plan.desc)
                for layout in (plan.w, plan.x, plan.y):
                    stack.callback(lt.matrix_layout_destroy, layout)
            self._plans.clear()

    def _plan(self, shape: Shape) -> _Plan:
        _check(shape)
        try:
            if len(self._plans) >= MAX_PLANS:
                self._forget_plans()  # host memory alone; queued products have read theirs
            with ExitStack() as made:  # a plan that fails leaves none of its parts behind
                plan = self._make_plan(shape, made)
                made.pop_all()
                return plan
        except _FAILURES as error:
            raise KernelError("gemm", f"{shape} cannot be planned: {error}") from error

    def _make_plan(self, shape: Shape, made: ExitStack) -> _Plan:
        """Create the parts of a plan; `made` holds what gives each back."""

        def layout(kind: int, rows: int, columns: int, stride: int) -> int:
            it: int = lt.matrix_layout_create(kind, rows, columns, stride)
            made.callback(lt.matrix_layout_destroy, it)
            return it

        desc = lt.matmul_desc_create(cublas.ComputeType.COMPUTE_32F, _FLOAT32)
        made.callback(lt.matmul_desc_destroy, desc)
        operations = lt.MatmulDescAttribute
        _set_desc(desc, operations.TRANSA, cublas.Operation.T)
        _set_desc(desc, operations.TRANSB, cublas.Operation.N)
        w = layout(_BFLOAT16, shape.k, shape.n, shape.k)
        x = layout(_BFLOAT16, shape.k, shape.m, shape.ldx)
        y = layout(_FLOAT32 if shape.accumulate_f32 else _BFLOAT16, shape.n, shape.m, shape.ldy)
        algorithm = self._first_algorithm(shape, desc, w, x, y)
        beta = _SCALARS[1.0 if shape.accumulate_f32 else 0.0].ctypes.data
        return _Plan(desc, w, x, y, algorithm, beta)

    def _first_algorithm(self, shape: Shape, desc: int, w: int, x: int, y: int) -> Any:
        wanted = lt.MatmulPreferenceAttribute
        preference = lt.matmul_preference_create()
        try:
            _set_preference(preference, wanted.MAX_WORKSPACE_BYTES, WORKSPACE_BYTES)
            _set_preference(preference, wanted.REDUCTION_SCHEME_MASK, _REDUCE_IN_FLOAT32)
            for attribute, num_bytes in (
                (wanted.MIN_ALIGNMENT_A_BYTES, shape.alignments[0]),
                (wanted.MIN_ALIGNMENT_B_BYTES, shape.alignments[1]),
                (wanted.MIN_ALIGNMENT_C_BYTES, shape.alignments[2]),
                (wanted.MIN_ALIGNMENT_D_BYTES, shape.alignments[2]),
            ):
                _set_preference(preference, attribute, num_bytes)
            found, count = lt.MatmulHeuristicResult(1), np.zeros(1, np.int32)
            lt.matmul_algo_get_heuristic(
                self._handle, desc, w, x, y, y, preference, 1, found.ptr, count.ctypes.data
            )
        finally:
            lt.matmul_preference_destroy(preference)
        if count[0] == 0 or int(found.state) != 0:  # a record holds only if its own state says so
            raise InvalidArgument("gemm", f"cuBLASLt has no algorithm for {shape}")
        return found


def _aligned(address: int) -> int:
    return min(256, address & -address) if address else 256


def _check(shape: Shape) -> None:
    for name in ("m", "n", "k"):
        if getattr(shape, name) < 1:
            raise InvalidArgument.value("gemm", name, getattr(shape, name), "at least 1")
    if shape.ldx < shape.k:
        raise InvalidArgument.value("gemm", "ldx", shape.ldx, f"at least k, {shape.k}")
    if shape.ldy < shape.n:
        raise InvalidArgument.value("gemm", "ldy", shape.ldy, f"at least n, {shape.n}")


def _set_desc(desc: int, attribute: Any, value: int) -> None:
    held: NDArray[Any] = np.array([value], lt.get_matmul_desc_attribute_dtype(attribute))
    lt.matmul_desc_set_attribute(desc, attribute, held.ctypes.data, held.itemsize)


def _set_preference(preference: int, attribute: Any, value: int) -> None:
    held: NDArray[Any] = np.array([value], lt.get_matmul_preference_attribute_dtype(attribute))
    lt.matmul_preference_set_attribute(preference, attribute, held.ctypes.data, held.itemsize)
