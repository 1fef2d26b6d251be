"""What launchers refuse before a kernel runs: sizes out of range, unaligned addresses."""

from __future__ import annotations

from kernels.errors import InvalidArgument

# A thread reads and writes 16 bytes at a time: 8 bf16 or 4 float32.
ALIGNMENT_BYTES = 16
ROW_MULTIPLE = 8


def check(ok: bool, kernel: str, name: str, got: object, allowed: str) -> None:
    """Raise InvalidArgument unless `ok`."""
    if not ok:
        raise InvalidArgument.value(kernel, name, got, allowed)


def check_positive(kernel: str, **sizes: int) -> None:
    """Refuse a size under 1, and one that is no C int."""
    for name, size in sizes.items():
        check(0 < size < 1 << 31, kernel, name, size, "in [1, 2^31)")


def check_multiple(kernel: str, multiple: int, **sizes: int) -> None:
    """Refuse a size that is not a multiple of `multiple`."""
    for name, size in sizes.items():
        check(size % multiple == 0, kernel, name, size, f"a multiple of {multiple}")


def check_aligned(kernel: str, **addresses: int) -> None:
    """Refuse an address that does not start on 16 bytes; 0 (absent) passes."""
    for name, address in addresses.items():
        check(
            address % ALIGNMENT_BYTES == 0,
            kernel,
            name,
            address,
            f"on a multiple of {ALIGNMENT_BYTES} bytes",
        )
