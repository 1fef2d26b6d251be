"""The fake GPU's bytes in a folder: counted alike by every process, kill -9 included."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels.errors import OutOfMemory
from kernels.ipc.fake_physical import FakePhysical
from tests.tools import ROOT

SIZE = 4 << 20
HOLDER = """
import mmap, sys
from pathlib import Path
from kernels.ipc.fake_physical import FakePhysical
region = FakePhysical(1 << 30, folder=Path(sys.argv[1])).create(4 << 20)
if sys.argv[2] == "mapping":
    import os
    fd = region.export()
    held = mmap.mmap(fd, 4 << 20)
    os.close(fd)
    region.close()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["memfd", "folder"])
def physical(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakePhysical]:
    made = FakePhysical(8 << 20, folder=tmp_path if request.param == "folder" else None)
    yield made
    made.close()


def test_regions_count_until_they_are_closed(physical: FakePhysical) -> None:
    first, second = physical.create(SIZE), physical.create(SIZE)
    assert physical.used_bytes() == 2 * SIZE
    first.close()
    assert physical.used_bytes() == SIZE
    second.close()
    assert physical.used_bytes() == 0


def test_what_others_hold_cannot_be_created_again(physical: FakePhysical) -> None:
    region = physical.create(SIZE)
    fd = region.export()
    region.close()
    with pytest.raises(OutOfMemory, match="asked for 8,388,608 bytes, 4,194,304 are free"):
        physical.create(2 * SIZE)
    os.close(fd)
    physical.create(2 * SIZE).close()


def test_each_export_holds_the_bytes_by_itself(physical: FakePhysical) -> None:
    region = physical.create(SIZE)
    first, second = region.export(), region.export()
    region.close()
    os.close(first)
    assert physical.used_bytes() == SIZE
    os.close(second)
    assert physical.used_bytes() == 0


def test_counting_leaves_no_descriptor(physical: FakePhysical) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        region = physical.create(SIZE)
        os.close(region.export())
        region.close()
        physical.used_bytes()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("what", ["handle", "mapping"])
def test_bytes_of_a_killed_process_are_counted_until_it_is_dead(tmp_path: Path, what: str) -> None:
    observer = FakePhysical(1 << 30, folder=tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path), what]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        alive = observer.used_bytes()
        holder.kill()
    assert (alive, observer.used_bytes()) == (SIZE, 0)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
