"""Weights as they stand in a GGUF file to bf16."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.device import Device
from kernels.ops.checks import check, check_aligned
from kernels.specialisation import Family


@dataclass(frozen=True)
class BlockFormat:
    """One way of storing numbers.

    Attributes:
        number: what GGML calls the type.
        values: numbers of a block.
        num_bytes: of a block.
    """

    number: int
    values: int
    num_bytes: int


DEQUANT_TYPES = {
    "F32": BlockFormat(0, 1, 4),
    "F16": BlockFormat(1, 1, 2),
    "BF16": BlockFormat(30, 1, 2),
    "Q8_0": BlockFormat(8, 32, 34),
    "Q4_K": BlockFormat(12, 256, 144),
    "Q5_K": BlockFormat(13, 256, 176),
    "Q6_K": BlockFormat(14, 256, 210),
}

DEQUANT = Family(
    "dequant.cu", "dequant", GGML_TYPE=tuple(kind.number for kind in DEQUANT_TYPES.values())
)

TILE_VALUES = 8192  # of a block of threads, as in the source
MAX_VALUES = TILE_VALUES * ((1 << 31) - 1)


def dequant(device: Device, dtype: str, source: int, target: int, num_values: int) -> None:
    """Convert whole blocks of a type.

    Args:
        dtype: one of `DEQUANT_TYPES`.
        source: the blocks' bytes as in the file.
        target: bf16 [num_values].
        num_values: whole blocks of them.
    """
    kind = DEQUANT_TYPES.get(dtype)
    if kind is None:
        allowed = f"one of {', '.join(DEQUANT_TYPES)}"
        check(False, "dequant", "dtype", dtype, allowed)
        return
    whole = 0 < num_values <= MAX_VALUES and num_values % kind.values == 0
    check(whole, "dequant", "num_values", num_values, f"whole blocks of {kind.values}, at least 1")
    check_aligned("dequant", source=source, target=target)
    device.launch(
        DEQUANT.source(GGML_TYPE=kind.number),
        (-(-num_values // TILE_VALUES),),
        256,
        (source, target, num_values),
    )
