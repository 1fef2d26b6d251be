"""Hold a GPU's memory so that only so much stays free, until standard input closes.

    python -m bench.ballast --leave-gib 24

Makes a large card as small as a benchmark asks, enforced by the driver and not by arithmetic.
Prints one JSON line (`held_bytes`, `free_bytes`) when the memory is held. Refuses a card that has
less than that free already.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from bench.gpu_options import open_cuda
from kernels.device import Device, Memory
from kernels.errors import OutOfMemory

PIECE_BYTES = 1 << 30
GRAIN_BYTES = 2 << 20  # what the driver hands out at least


def hold(device: Device, leave_bytes: int) -> list[Memory]:
    """Allocate until `leave_bytes` are free, to 2 MiB and a piece's rounding.

    Raises:
        ValueError: fewer are free already.
    """
    if device.free_bytes() < leave_bytes:
        raise ValueError(f"only {device.free_bytes()} bytes are free, asked to leave {leave_bytes}")
    held: list[Memory] = []
    piece = PIECE_BYTES
    while piece >= GRAIN_BYTES:
        if device.free_bytes() - leave_bytes < piece:
            piece //= 2
            continue
        try:
            held.append(device.allocate(piece))
        except OutOfMemory:  # free, yet not in one piece
            piece //= 2
    return held


def main(arguments: list[str] | None = None, open_device: Callable[[], Device] = open_cuda) -> int:
    """Hold, say so, wait for the end of the input, let go."""
    parser = argparse.ArgumentParser(prog="python -m bench.ballast", description=__doc__)
    parser.add_argument("--leave-gib", type=float, required=True)
    options = parser.parse_args(arguments)
    device = open_device()
    try:
        held = hold(device, int(options.leave_gib * (1 << 30)))
        report = {
            "held_bytes": sum(memory.num_bytes for memory in held),
            "free_bytes": device.free_bytes(),
        }
        print(json.dumps(report), flush=True)
        sys.stdin.read()
        for memory in held:
            memory.close()
    finally:
        device.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
