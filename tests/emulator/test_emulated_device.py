"""The emulated device keeps the promises of `kernels.device` and checks what is passed to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kernels.device import Arg, KernelSource, TensorMap
from kernels.errors import CompileError, InvalidArgument, LaunchError, OutOfMemory
from kernels.reference.rounding import round_to_bf16
from tests.emulator.build import Edit
from tests.emulator.device import EmulatedDevice
from tests.tools import require_tool

SCALE = KernelSource("scale.cu", "scale")
SCALE_TEXT = """#include "common.cuh"
extern "C" __global__ void __launch_bounds__(64) scale(const float* in, float* out, int n, float by,
                                                       u64 bytes) {
  __shared__ float slots[64];
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  slots[threadIdx.x] = i < n ? in[i] * by + static_cast<float>(bytes) : 0.0f;
  __syncthreads();
  if (i < n) out[i] = slots[threadIdx.x];
}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the kernel `scale`."""
    require_tool("g++")
    (tmp_path / "scale.cu").write_text(SCALE_TEXT)
    return tmp_path


@pytest.fixture
def device(folder: Path) -> Iterator[EmulatedDevice]:
    device = EmulatedDevice(folder=folder, total_bytes=1 << 20)
    yield device
    device.close()


def launch_scale(device: EmulatedDevice, count: int = 1000) -> np.ndarray:
    """The result of scale on 0, 1, 2 ... by 3, plus 5."""
    values, out = np.arange(count, dtype=np.float32), np.empty(count, np.float32)
    source, target = device.allocate(values.nbytes), device.allocate(out.nbytes)
    device.upload(source.address, values)
    args = (source.address, target.address, np.int32(count), np.float32(3), 5)
    device.launch(SCALE, (-(-count // 64),), 64, args)
    device.download(target.address, out)
    return out


def test_arguments_of_each_kind_arrive(device: EmulatedDevice) -> None:
    np.testing.assert_array_equal(launch_scale(device), np.arange(1000) * 3 + 5)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_order_and_number_of_workers_change_no_bit(folder: Path, workers: int, order: str) -> None:
    device = EmulatedDevice(folder=folder, workers=workers, order=order)  # type: ignore[arg-type]
    np.testing.assert_array_equal(launch_scale(device), np.arange(1000) * 3 + 5)
    device.close()


A, B = 1, 2  # stand for two allocations


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((A, B, np.int32(4), np.float32(1)), "4 arguments for 5 parameters"),
        ((A, B, 4, np.float32(1), 0), "argument 2 is a int, the parameter takes a 32-bit integer"),
        ((A, B, np.int32(4), 1, 0), "argument 3 is a int, the parameter takes a float"),
        ((A, np.int32(1), np.int32(4), np.float32(1), 0), "argument 1 is a int32, .* a pointer"),
        ((A, B, np.int32(4), np.float32(1), np.int32(0)), "argument 4 is a int32, .* 64-bit"),
        ((A, 12345, np.int32(4), np.float32(1), 0), "argument 1, 0x3039, is no device pointer"),
        (
            (A, TensorMap(0, (1, 1), 16, (1, 8)), np.int32(4), np.float32(1), 0),
            "argument 1 is a TensorMap, the parameter takes a pointer",
        ),
    ],
)
def test_arguments_that_do_not_fit_the_signature_are_refused(
    device: EmulatedDevice, args: tuple[Arg, ...], message: str
) -> None:
    addresses = {A: device.allocate(16).address, B: device.allocate(16).address}
    given = tuple(addresses.get(arg, arg) if type(arg) is int else arg for arg in args)
    with pytest.raises(LaunchError, match=message):
        device.launch(SCALE, (1,), 64, given)


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "message"),
    [
        ((0,), 64, 0, "grid"),
        ((1, 70000), 64, 0, "grid"),
        ((1,), 1025, 0, "a block of 1025 threads"),
        ((1,), 64, 163 * 1024, "167168 bytes of shared memory, allowed 166912"),
    ],
)
def test_launch_beyond_the_limits_of_the_card_is_refused(
    device: EmulatedDevice, grid: tuple[int, ...], block: int, shared_bytes: int, message: str
) -> None:
    memory = device.allocate(16)
    args = (memory.address, memory.address, np.int32(0), np.float32(1), 0)
    with pytest.raises(LaunchError, match=message):
        device.launch(SCALE, grid, block, args, shared_bytes=shared_bytes)


def test_memory_starts_as_nan_and_is_counted(device: EmulatedDevice) -> None:
    memory, out = device.allocate(400), np.zeros(100, np.float32)
    device.download(memory.address, out)
    assert np.isnan(out).all()
    assert device.free_bytes() == (1 << 20) - 400
    memory.close()
    memory.close()
    assert device.free_bytes() == 1 << 20


def test_more_than_the_device_has_is_out_of_memory(device: EmulatedDevice) -> None:
    with pytest.raises(OutOfMemory, match="asked for 1,048,577 bytes, 1,048,576 are free"):
        device.allocate((1 << 20) + 1)


def test_copies_outside_an_allocation_are_refused(device: EmulatedDevice) -> None:
    memory = device.allocate(16)
    with pytest.raises(InvalidArgument, match="upload: the range must be inside one allocation"):
        device.upload(memory.address, np.zeros(5, np.float32))
    with pytest.raises(InvalidArgument, match="download"):
        device.download(memory.address + 4, np.zeros(4, np.float32))
    with pytest.raises(InvalidArgument, match="fill"):
        device.fill(memory.address - 1, 4)


def test_released_memory_is_no_argument_any_more(device: EmulatedDevice) -> None:
    source, target = device.allocate(4096), device.allocate(4096)
    source.close()
    args = (source.address, target.address, np.int32(64), np.float32(1), 0)
    with pytest.raises(LaunchError, match="is no device pointer"):
        device.launch(SCALE, (1,), 64, args)


@pytest.mark.parametrize("accumulate", [False, True])
def test_gemm_is_the_product_of_strided_bf16_matrices(
    device: EmulatedDevice, accumulate: bool
) -> None:
    rng = np.random.default_rng(8)
    m, n, k, ldx, ldy = 5, 7, 16, 24, 9
    x, w = (round_to_bf16(rng.standard_normal(s).astype(np.float32)) for s in ((m, ldx), (n, k)))
    kind = np.float32 if accumulate else np.uint16
    y = np.arange(m * ldy).reshape(m, ldy).astype(kind)
    memories = [device.allocate(size) for size in (m * ldx * 2, n * k * 2, y.nbytes)]
    for memory, bits in zip(memories, (x, w), strict=False):
        device.upload(memory.address, (bits.view(np.uint32) >> 16).astype(np.uint16))
    device.upload(memories[2].address, y)
    addresses = {name: memory.address for name, memory in zip("xwy", memories, strict=True)}
    device.gemm(**addresses, m=m, n=n, k=k, ldx=ldx, ldy=ldy, accumulate_f32=accumulate)
    out = np.empty_like(y)
    device.download(memories[2].address, out)
    wanted: np.ndarray = x[:, :k] @ w.T
    np.testing.assert_array_equal(out[:, n:], y[:, n:])
    if accumulate:
        np.testing.assert_allclose(out[:, :n], y[:, :n] + wanted, rtol=1e-6)
    else:
        np.testing.assert_array_equal(
            (out[:, :n].astype(np.uint32) << 16).view(np.float32), round_to_bf16(wanted)
        )


@pytest.mark.parametrize(
    ("shape", "row_stride_bytes", "box"),
    [
        ((4, 64), 130, (4, 64)),
        ((4, 64), 112, (4, 64)),
        ((4, 64), 128, (257, 64)),
        ((4, 64), 128, (4, 72)),
        ((5, 64), 128, (4, 64)),
    ],
)
def test_tensor_map_that_the_copy_engine_cannot_read_is_refused(
    device: EmulatedDevice, shape: tuple[int, int], row_stride_bytes: int, box: tuple[int, int]
) -> None:
    memory = device.allocate(4 * 128)
    with pytest.raises(InvalidArgument, match="tensor_map"):
        device.tensor_map(memory.address, shape, row_stride_bytes, box)


def test_edit_plants_a_defect_that_changes_the_result(folder: Path) -> None:
    edit = Edit("scale.cu", "in[i] * by", "in[i] + by")
    device = EmulatedDevice(folder=folder, edits=(edit,))
    np.testing.assert_array_equal(launch_scale(device), np.arange(1000) + 3 + 5)
    device.close()


def test_edit_of_a_text_that_stands_there_twice_is_refused(folder: Path) -> None:
    device = EmulatedDevice(folder=folder, edits=(Edit("scale.cu", "slots", "places"),))
    with pytest.raises(ValueError, match="'slots' 3 times, not once"):
        launch_scale(device)
    device.close()


def test_source_that_does_not_compile_says_file_and_line(folder: Path) -> None:
    edit = Edit("scale.cu", "__syncthreads();", "__syncthreads()")
    device = EmulatedDevice(folder=folder, edits=(edit,))
    with pytest.raises(CompileError, match=r"scale\.cu:\d+"):
        launch_scale(device)
    device.close()


def test_marks_tell_the_time_between_them(device: EmulatedDevice) -> None:
    earlier, later = device.record(), device.record()
    later.wait()
    assert later.seconds_since(earlier) >= 0
