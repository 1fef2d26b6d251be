"""Images: shared by descriptor, sealed against writers, hashed as sha256 does."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from kernels.errors import HandleError, InvalidArgument
from kernels.ipc.image import CHUNK_BYTES, checksum, create_image, open_image, seal_image

SIZE = 100_000


@pytest.fixture
def fd() -> int:
    """An image of SIZE bytes that begins with `weights`; the test closes it."""
    made = create_image(SIZE)
    written = open_image(made, writable=True)
    written.bytes_[:7] = np.frombuffer(b"weights", np.uint8)
    written.close()
    return made


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings_of_images() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:skim-image")


def test_new_image_is_zero_and_as_long_as_asked() -> None:
    fd = create_image(SIZE)
    image = open_image(fd, writable=False)
    assert image.size_bytes == image.bytes_.size == SIZE and not image.bytes_.any()
    image.close()
    os.close(fd)


def test_what_one_maps_and_writes_another_reads(fd: int) -> None:
    writer, reader = open_image(fd, writable=True), open_image(fd, writable=False)
    os.close(fd)
    writer.bytes_[SIZE - 1] = 77
    assert reader.bytes_[:7].tobytes() == b"weights" and reader.bytes_[SIZE - 1] == 77
    writer.close()
    reader.close()


def test_image_opened_to_read_cannot_be_written(fd: int) -> None:
    image = open_image(fd, writable=False)
    with pytest.raises(ValueError, match="read-only"):
        image.bytes_[0] = 1
    image.close()
    os.close(fd)


def test_closed_image_leaves_no_mapping_and_no_descriptor() -> None:
    fds, mappings = open_fds(), mappings_of_images()
    fd = create_image(SIZE)
    image = open_image(fd, writable=True)
    os.close(fd)
    for _ in range(2):
        image.close()
    assert (open_fds(), mappings_of_images(), image.bytes_.size) == (fds, mappings, 0)


def test_view_outlives_the_image_that_was_closed(fd: int) -> None:
    mappings = mappings_of_images()
    image = open_image(fd, writable=False)
    os.close(fd)
    view = image.bytes_[:7]
    image.close()
    assert view.tobytes() == b"weights"
    del view
    assert mappings_of_images() == mappings


@pytest.mark.parametrize("size_bytes", [SIZE - 1, SIZE + 1])
def test_image_keeps_the_size_it_was_made_with(fd: int, size_bytes: int) -> None:
    """Who reads past the end of a shrunk file is killed."""
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size_bytes)
    os.close(fd)


def test_sealed_image_can_be_read_and_no_more_than_read(fd: int) -> None:
    seal_image(fd)
    for change in (
        lambda: open_image(fd, writable=True),
        lambda: os.pwrite(fd, b"x", 0),
    ):
        with pytest.raises((HandleError, PermissionError)):
            change()
    image = open_image(fd, writable=False)
    assert image.bytes_[:7].tobytes() == b"weights"
    image.close()
    os.close(fd)


def test_image_is_sealed_while_its_writer_has_it_mapped(fd: int) -> None:
    """Pinned pages cannot be unmapped for it; the writer's own mapping stays what it was."""
    writer = open_image(fd, writable=True)
    for _ in range(2):
        seal_image(fd)
    with pytest.raises(HandleError, match="cannot be mapped writable"):
        open_image(fd, writable=True)
    writer.close()
    os.close(fd)


@pytest.mark.parametrize("kind", ["pipe", "file", "closed"])
def test_descriptor_that_is_no_image_is_not_sealed(tmp_path: Path, kind: str) -> None:
    here, there = os.pipe()
    fd = there
    if kind == "file":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.close(here)
    if kind == "closed":
        os.close(fd)
    with pytest.raises(HandleError, match="is no image"):
        seal_image(fd)
    for opened in {fd, there} if kind == "file" else {fd} if kind == "pipe" else set():
        os.close(opened)


@pytest.mark.parametrize("kind", ["pipe", "empty", "closed"])
def test_descriptor_that_cannot_be_mapped_is_refused_and_stays_the_callers(kind: str) -> None:
    here, there = os.pipe()
    os.close(there)
    fd = os.memfd_create("empty") if kind == "empty" else here
    if kind == "closed":
        os.close(here)
    with pytest.raises(HandleError, match="image: cannot be mapped read-only"):
        open_image(fd, writable=False)
    if kind != "closed":
        os.close(fd)
    if kind == "empty":
        os.close(here)


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_image_of_no_bytes_is_refused(size_bytes: int) -> None:
    with pytest.raises(InvalidArgument, match=f"size_bytes must be at least 1, got {size_bytes}"):
        create_image(size_bytes)


def test_image_larger_than_files_may_be_is_refused_without_a_descriptor_left() -> None:
    fds = open_fds()
    with pytest.raises(HandleError, match="cannot be 9,223,372,036,854,775,808 bytes long"):
        create_image(2**63)
    assert open_fds() == fds


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_checksum_is_the_sha256_of_all_bytes(size: int) -> None:
    values = np.random.default_rng(5).integers(0, 256, size, np.uint8)
    assert checksum(values) == hashlib.sha256(values.tobytes()).hexdigest()


def test_checksum_of_an_image_changes_with_its_last_byte(fd: int) -> None:
    image = open_image(fd, writable=True)
    before = checksum(image.bytes_)
    image.bytes_[-1] ^= 1
    assert checksum(image.bytes_) != before
    image.close()
    os.close(fd)


@pytest.mark.parametrize("array", [np.zeros(4, np.float32), np.zeros((4, 4), np.uint8)[:, :2]])
def test_checksum_takes_contiguous_bytes_only(array: np.ndarray) -> None:
    with pytest.raises(InvalidArgument, match="array must be C-contiguous uint8, got"):
        checksum(array)
