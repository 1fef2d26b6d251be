"""Each defect that the emulator promises to show is shown, and its absence is not."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.device import KernelSource
from kernels.errors import LaunchError
from tests.emulator.running import Run

THREADS = 128
IN = np.ones((THREADS, 4), np.float32)
RAISED = {  # defect: what the error says
    "half_a_warp_shuffles": "no thread can go on: threads 0-15: waits at __shfl_xor_sync; "
    "threads 16-31: has ended",
    "lanes_meet_at_different_operations": "the warp has diverged: this lane is at __ballot_sync",
    "shuffle_reads_outside_its_mask": "reads lane 16, which is not in the mask 0xffff",
    "warp_leaves_before_the_barrier": "threads 0-31: waits at __syncthreads, barrier 0, 96 of 128 "
    "threads there; threads 32-63: has ended",
    "named_barrier_counts_too_many": "waits at bar.sync, barrier 3, 64 of 96 threads there",
    "barrier_in_half_a_warp": "barrier 0, 48 of 128 threads there",
    "reads_a_row_past_the_end": r"access outside device memory at defects.cu:\d+, 0x[0-9a-f]+: 0 "
    "bytes past the end of the 2048 bytes",
    "copies_a_row_past_the_end": "cp.async: 16 bytes at 0x[0-9a-f]+ are outside every device",
    "writes_past_the_end": "0 bytes past the end of the 512 bytes",
    "writes_past_shared_memory": "wrote past the end of 512 bytes of dynamic shared memory",
    "writes_ones_past_shared_memory": "wrote past the end of 512 bytes of dynamic shared memory",
    "loads_a_matrix_past_shared_memory": "ldmatrix: 16 bytes at shared address 0x600, outside",
    "vector_is_misaligned": "trap: a misaligned access or an index outside an array at defects.cu",
    "copy_is_misaligned": "cp.async: shared address 0x[0-9a-f]+ is not 16-byte aligned",
    "indexes_past_an_array": "trap: a misaligned access or an index outside an array at defects.cu",
    "divides_by_zero": "integer division by zero at defects.cu",
}
POISONED = [  # defects that leave NaN in the output
    "copy_is_not_waited_for",
    "wait_leaves_the_needed_group",
    "copy_overwrites_what_is_still_read",
    "reads_shared_memory_unwritten",
]
RACES = ["barrier_is_missing", "second_barrier_is_missing", "warp_barrier_is_missing"]
TAKES_INPUT = {
    "copy_is_not_waited_for",
    "wait_leaves_the_needed_group",
    "copy_overwrites_what_is_still_read",
    "reads_a_row_past_the_end",
    "copies_a_row_past_the_end",
    "copy_is_misaligned",
}
SHARED = {
    "writes_past_shared_memory",
    "writes_ones_past_shared_memory",
    "loads_a_matrix_past_shared_memory",
}


def launch(run: Run, defect: str, *, fixed: bool = False, **options: object) -> np.ndarray:
    """The output of one kernel of defects.cu."""
    out = np.full(THREADS, np.nan, np.float32)
    inputs = (IN,) if defect in TAKES_INPUT else ()
    source = KernelSource("defects.cu", defect, (("FIXED", 1),) if fixed else ())
    shared_bytes = 512 if defect in SHARED else 0
    return run(source, *inputs, out, block=THREADS, shared_bytes=shared_bytes, **options)[-1]


@pytest.mark.parametrize("defect", RAISED)
def test_defect_is_an_error_that_names_kernel_block_and_cause(run: Run, defect: str) -> None:
    with pytest.raises(LaunchError, match=RAISED[defect]) as caught:
        launch(run, defect)
    assert caught.value.kernel == defect
    assert "block (0, 0, 0)" in str(caught.value)


@pytest.mark.parametrize("defect", POISONED)
def test_defect_leaves_nan_where_the_data_was_not_there(run: Run, defect: str) -> None:
    assert np.isnan(launch(run, defect)).any()


@pytest.mark.parametrize("defect", RACES)
def test_race_shows_when_the_threads_run_in_both_orders(run: Run, defect: str) -> None:
    with pytest.raises(LaunchError, match="a race: .* depend on the order of the threads"):
        launch(run, defect, check_races=True)


@pytest.mark.parametrize("defect", [*RAISED, *POISONED, *RACES])
def test_the_same_kernel_without_its_defect_runs_in_both_orders(run: Run, defect: str) -> None:
    out = launch(run, defect, fixed=True, check_races=True)
    assert not np.isnan(out).all()
    assert defect not in POISONED or not np.isnan(out).any()


def test_thread_that_fails_is_the_one_named(run: Run) -> None:
    with pytest.raises(LaunchError, match=r"block \(0, 0, 0\), thread 127: access outside"):
        launch(run, "reads_a_row_past_the_end")


def test_device_works_on_after_a_failed_launch(run: Run) -> None:
    with pytest.raises(LaunchError):
        launch(run, "writes_past_the_end")
    assert (launch(run, "writes_past_the_end", fixed=True) == 1).all()


def test_two_processes_share_the_blocks_and_report_the_others_fault(run: Run) -> None:
    source = KernelSource("defects.cu", "writes_past_the_end")
    with pytest.raises(LaunchError, match="past the end of the 512 bytes"):
        run(source, np.zeros(THREADS, np.float32), block=THREADS, grid=(2,), workers=2)
