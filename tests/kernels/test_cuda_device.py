"""CudaDevice keeps the promises of `kernels.device.Device`, on a GPU or on a driver without one.

The tests run where `SKIM_FAKE_DRIVER` says that the driver is the one of tests/fixtures, or with a
GPU. Where there is neither, `test_cuda_device_without_gpu` runs them in a process of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kernels.device import KernelSource
from kernels.errors import InvalidArgument, KernelError, LaunchError, OutOfMemory

if TYPE_CHECKING:
    from kernels.cuda_device import CudaDevice

pytestmark = pytest.mark.gpu
SOURCES = Path(__file__).resolve().parents[2] / "kernels/cuda"
FAKE = bool(os.environ.get("SKIM_FAKE_DRIVER"))
only_fake = pytest.mark.skipif(not FAKE, reason="reads what the driver of tests/fixtures keeps")
only_gpu = pytest.mark.skipif(FAKE, reason="computes on the GPU")

SOURCE = """\
struct alignas(64) Map { char bytes[128]; };
extern "C" __global__ void axpy(float* y, const float* x, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i];
}
extern "C" __global__ void read_map(const __grid_constant__ Map map, char* out) {
    out[threadIdx.x] = map.bytes[threadIdx.x];
}
extern "C" __global__ void fail() {}
"""
TILE = """\
#include "hopper.cuh"
extern "C" __global__ void load_tile(const __grid_constant__ TMap map, int x, int y, u32* out) {
    __shared__ alignas(1024) u32 tile[128 * 32];
    __shared__ u64 barrier;
    if (threadIdx.x == 0) {
        mbarrier_init(&barrier, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(&barrier, sizeof tile);
        tma_load_2d(tile, &map, x, y, &barrier);
    }
    mbarrier_wait(&barrier, 0);
    for (int i = threadIdx.x; i < 128 * 32; i += blockDim.x) out[i] = tile[i];
}
"""
AXPY, FAIL = KernelSource("small.cu", "axpy"), KernelSource("small.cu", "fail")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[CudaDevice]:
    from kernels.errors import NoDevice

    try:
        from kernels.cuda_device import CudaDevice

        (tmp_path / "small.cu").write_text(SOURCE)
        made = CudaDevice(cache_dir=None, sources=tmp_path)
    except (ImportError, NoDevice) as error:
        pytest.skip(f"needs a CUDA device: {error}")
    yield made
    made.close()


def _random(num_bytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


@pytest.mark.parametrize("num_bytes", [1, 255, 3_000_001, (40 << 20) + 7])
def test_download_returns_what_was_uploaded(device: CudaDevice, num_bytes: int) -> None:
    sent, got = _random(num_bytes, 1), np.zeros(num_bytes, np.uint8)
    memory = device.allocate(num_bytes)
    device.upload(memory.address, sent)
    device.download(memory.address, got)
    assert np.array_equal(sent, got)


def test_array_may_change_once_upload_returned(device: CudaDevice) -> None:
    sent = _random(20 << 20, 2)
    kept, got = sent.copy(), np.zeros_like(sent)
    memory = device.allocate(sent.size)
    device.upload(memory.address, sent)
    sent[:] = 0
    device.download(memory.address, got)
    assert np.array_equal(kept, got)


def test_many_small_uploads_each_arrive(device: CudaDevice) -> None:
    rows = _random(3_000 * 12_345, 3).reshape(3_000, 12_345)  # 37 MB: the slots turn over
    memory, got = device.allocate(rows.size), np.zeros_like(rows)
    for i, row in enumerate(rows):
        device.upload(memory.address + i * row.size, row)
    device.download(memory.address, got)
    assert np.array_equal(rows, got)


def test_upload_takes_any_dtype_and_shape(device: CudaDevice) -> None:
    sent = np.arange(12, dtype=np.float32).reshape(3, 4)
    memory, got = device.allocate(sent.nbytes), np.zeros((4, 3), np.float32)
    device.upload(memory.address, sent)
    device.download(memory.address, got)
    assert np.array_equal(sent.reshape(-1), got.reshape(-1))


def test_array_that_is_not_contiguous_is_refused(device: CudaDevice) -> None:
    with pytest.raises(InvalidArgument, match="C-contiguous"):
        device.upload(0, np.zeros((4, 4), np.float32)[:, :2])
    with pytest.raises(InvalidArgument, match="C-contiguous"):
        device.download(0, np.zeros((4, 4), np.float32).T)


def test_fill_sets_only_the_bytes_asked_for(device: CudaDevice) -> None:
    memory, got = device.allocate(64), np.zeros(64, np.uint8)
    device.fill(memory.address, 64, 0xFF)
    device.fill(memory.address + 8, 16)
    device.download(memory.address, got)
    assert (got[8:24] == 0).all() and (got[:8] == 0xFF).all() and (got[24:] == 0xFF).all()


def test_kernel_gets_pointers_floats_and_ints(device: CudaDevice) -> None:
    x, y = np.arange(1_000, dtype=np.float32), np.ones(1_000, np.float32)
    at_x, at_y = device.allocate(x.nbytes), device.allocate(y.nbytes)
    device.upload(at_x.address, x)
    device.upload(at_y.address, y)
    args = (at_y.address, at_x.address, np.float32(0.5), np.int32(999))
    device.launch(AXPY, (4,), 256, args)
    got = np.zeros_like(y)
    device.download(at_y.address, got)
    expected = np.where(np.arange(1_000) < 999, 1 + 0.5 * x, 1)
    assert np.array_equal(got, expected)


def _launch(device: CudaDevice, block: int = 32, shared_bytes: int = 0) -> None:
    memory = device.allocate(4)
    args = (memory.address, memory.address, np.float32(0), np.int32(0))
    device.launch(AXPY, (1,), block, args, shared_bytes=shared_bytes)
    device.synchronize()


def test_large_shared_memory_is_permitted(device: CudaDevice) -> None:
    for shared_bytes in (40 << 10, 60 << 10, 96 << 10, 50 << 10):
        _launch(device, shared_bytes=shared_bytes)


def test_more_shared_memory_than_the_gpu_has_is_refused_by_name(device: CudaDevice) -> None:
    with pytest.raises(LaunchError, match="axpy: asks for 307200 bytes of shared memory") as caught:
        _launch(device, shared_bytes=300 << 10)
    assert caught.value.kernel == "axpy"


def test_refused_launch_names_the_kernel(device: CudaDevice) -> None:
    with pytest.raises(LaunchError, match="launch of grid .*INVALID") as caught:
        _launch(device, block=2_048)
    assert caught.value.kernel == "axpy"


def test_unknown_entry_is_refused_by_name(device: CudaDevice) -> None:
    with pytest.raises(LaunchError, match="missing: cannot be loaded on sm_"):
        device.launch(KernelSource("small.cu", "missing"), (1,), 32, ())


def test_allocation_that_does_not_fit_says_what_is_free(device: CudaDevice) -> None:
    with pytest.raises(OutOfMemory, match=f"asked for {device.total_bytes * 2:,} bytes"):
        device.allocate(device.total_bytes * 2)
    assert device.allocate(1).address


def test_closed_allocation_is_free_again(device: CudaDevice) -> None:
    before = device.free_bytes()
    memory = device.allocate(64 << 20)
    assert device.free_bytes() <= before - (64 << 20)
    memory.close()
    memory.close()
    assert device.free_bytes() == before


def test_marks_tell_the_time_between_them(device: CudaDevice) -> None:
    first = device.record()
    _launch(device)
    second = device.record()
    assert 0 < second.seconds_since(first) < 1


def test_any_thread_may_call(device: CudaDevice) -> None:
    """One after another, each with the number of the one before, as a new thread may have."""
    failures: list[BaseException] = []
    marks = []

    def use() -> None:
        try:
            for mark in marks:
                mark.wait()
            _launch(device)
            marks.append(device.record(timed=False))
            device.allocate(16).close()
        except BaseException as error:
            failures.append(error)

    for _ in range(3):
        other = threading.Thread(target=use)
        other.start()
        other.join()
    _launch(device)
    assert failures == [] and len(marks) == 3


@only_fake
@pytest.mark.parametrize("wait", ["synchronize", "download", "mark"])
def test_failure_inside_a_kernel_is_told_by_the_next_wait(device: CudaDevice, wait: str) -> None:
    memory = device.allocate(4)
    device.launch(FAIL, (1,), 32, ())
    with pytest.raises(LaunchError, match=r"fail: .*ILLEGAL_ADDRESS"):
        if wait == "synchronize":
            device.synchronize()
        elif wait == "download":
            device.download(memory.address, np.zeros(4, np.uint8))
        else:
            device.record().wait()


@only_fake
def test_close_lets_everything_go_whatever_fails(
    device: CudaDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.cuda_device import CudaDevice
    from kernels.cuda_memory import Staging

    def refuse(self: Staging) -> None:
        raise LaunchError("staging", "cannot be closed")

    monkeypatch.setattr(Staging, "close", refuse)
    before = device.free_bytes()
    failing = CudaDevice(cache_dir=None, sources=tmp_path)
    for _ in range(3):
        failing.upload(failing.allocate(64).address, np.zeros(64, np.uint8))
    failing.launch(FAIL, (1,), 32, ())
    with pytest.raises(LaunchError):
        failing.close()
    assert device.free_bytes() == before


@only_fake
def test_products_that_cannot_start_leave_no_memory_behind(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(stream: int, workspace: int) -> None:
        raise KernelError("gemm", "cuBLASLt cannot be used")

    monkeypatch.setattr("kernels.cuda_device.Gemm", refuse)
    before = device.free_bytes()
    for _ in range(2):
        with pytest.raises(KernelError, match="cuBLASLt"):
            device.gemm(x=256, w=256, y=256, m=1, n=1, k=1, ldx=1, ldy=1)
    assert device.free_bytes() == before


@pytest.mark.parametrize("timed", [True, False])
def test_waiting_for_a_mark_without_time_leaves_the_core(device: CudaDevice, timed: bool) -> None:
    assert device.record(timed=timed).event.is_blocking_sync is not timed


@only_fake
def test_tensor_map_holds_the_matrix_with_its_stride(device: CudaDevice) -> None:
    memory, out = device.allocate(64), device.allocate(128)
    made = device.tensor_map(memory.address, (1_000, 128), 8_192, (128, 64))
    device.launch(KernelSource("small.cu", "read_map"), (1,), 128, (made, out.address))
    got = np.zeros(128, np.uint8)
    device.download(out.address, got)
    wide, narrow = got[:32].view(np.uint64), got[32:72].view(np.uint32)
    assert wide.tolist() == [memory.address, 128, 1_000, 8_192]  # innermost first, stride in bytes
    assert narrow.tolist() == [64, 128, 1, 1, 9, 2, 0, 3, 3, 0]  # box, steps, bf16, rank, swizzle


@only_fake
def test_tensor_map_of_one_row_keeps_its_stride(device: CudaDevice) -> None:
    memory, out = device.allocate(64), device.allocate(128)
    made = device.tensor_map(memory.address, (1, 64), 4_096, (64, 64))
    device.launch(KernelSource("small.cu", "read_map"), (1,), 128, (made, out.address))
    got = np.zeros(128, np.uint8)
    device.download(out.address, got)
    assert got[:32].view(np.uint64).tolist() == [memory.address, 64, 1, 4_096]


@only_gpu
@pytest.mark.parametrize(("x", "y"), [(0, 0), (64, 128), (128, 896), (192, 1_000)])
def test_tensor_map_loads_swizzled_tiles_and_zeros_outside(
    device: CudaDevice, tmp_path: Path, x: int, y: int
) -> None:
    if device.arch != "sm_90a":
        pytest.skip(f"needs a Hopper GPU, this one is {device.arch}")
    for header in SOURCES.glob("*.cuh"):
        (tmp_path / header.name).write_text(header.read_text())
    (tmp_path / "tile.cu").write_text(TILE)
    matrix = np.random.default_rng(5).integers(0, 1 << 16, (1_001, 512), np.uint16)
    memory, out = device.allocate(matrix.nbytes), device.allocate(128 * 128)
    device.upload(memory.address, matrix)
    made = device.tensor_map(memory.address, (1_001, 200), 1_024, (128, 64))  # 200 of 512 columns
    args = (made, np.int32(x), np.int32(y), out.address)
    device.launch(KernelSource("tile.cu", "load_tile"), (1,), 128, args)
    got = np.zeros((128, 8, 8), np.uint16)  # row, 16-byte piece, element
    device.download(out.address, got)
    padded = np.zeros((1_200, 256), np.uint16)
    padded[:1_001, :200] = matrix[:, :200]
    rows, pieces = np.arange(128)[:, None], np.arange(8)[None, :]
    expected = padded[y : y + 128, x : x + 64].reshape(128, 8, 8)
    assert np.array_equal(got[rows, pieces ^ (rows % 8)], expected)


@only_gpu
@pytest.mark.parametrize("accumulate_f32", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 64), (129, 384, 256), (4_095, 1_024, 2_048)])
def test_product_is_that_of_float64(
    device: CudaDevice, m: int, n: int, k: int, accumulate_f32: bool
) -> None:
    rng = np.random.default_rng(4)
    ldx, ldy = k + 64, n + 32
    x, w = (_bf16(rng.standard_normal(shape, np.float32)) for shape in ((m, ldx), (n, k)))
    start = rng.standard_normal((m, ldy), np.float32)
    y = start if accumulate_f32 else _bf16(start)
    at = [device.allocate(array.nbytes) for array in (x, w, y)]
    for memory, array in zip(at, (x, w, y), strict=True):
        device.upload(memory.address, array)
    sizes = {"m": m, "n": n, "k": k, "ldx": ldx, "ldy": ldy}
    at_x, at_w, at_y = (memory.address for memory in at)
    device.gemm(x=at_x, w=at_w, y=at_y, **sizes, accumulate_f32=accumulate_f32)
    got = np.zeros_like(y)
    device.download(at_y, got)
    exact = _f64(x)[:, :k] @ _f64(w).T + (start[:, :n] if accumulate_f32 else 0)
    result = got if accumulate_f32 else _f64(got)
    scale = np.sqrt(k)  # of a sum of k products of unit normals
    # float32 sums of k terms stray by k^0.5 roundings of 2^-24; bf16 rounds at 2^-9 of the result
    tolerance = scale * 2.0**-24 * np.sqrt(k) * 8 + (0 if accumulate_f32 else 2.0**-8) * 5 * scale
    assert np.abs(result[:, :n] - exact).max() < tolerance
    assert np.array_equal(got[:, n:], y[:, n:])  # the columns beside Y stay as they were


def _bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _f64(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
