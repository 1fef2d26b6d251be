"""The drafter's whole service over planted block lists, for benchmarks of random weights.

    SKIM_DRAFTER_MODEL=drafter.gguf python -m bench.planted_drafter --density-file FILE

Everything is the product's own service; only what attention reads is `bench.planted.PlantedLists`
(means, scores and selection still run). The file holds a density or the word `natural` and is read
at the start of each pass, so a benchmark changes it between requests; without a file the selection
decides. Passes on a CPU take no lists: there the file changes nothing.
"""

from __future__ import annotations

import os

# As in `drafter_svc.__main__`, and as there before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import argparse
import sys
from functools import partial
from pathlib import Path

from bench.planted import PlantedLists
from drafter_svc.__main__ import serve
from drafter_svc.config import DrafterSettings
from kernels.device import Device
from kernels.reference import BlockLists, BlockRule
from skim.process import run_service

NATURAL = "natural"


class DensityFile:
    """Plants what a file says, asked anew at each pass's first layer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lists = PlantedLists(None)

    def __call__(
        self, layer: int, num_heads: int, num_tiles: int, rule: BlockRule
    ) -> BlockLists | None:
        """Give the lists of a layer; see `drafter_svc.cuda_lists.Planter`."""
        if layer == 0:
            self._lists.density = self.read()
        return self._lists(layer, num_heads, num_tiles, rule)

    def read(self) -> float | None:
        """The density, or None for `natural` and where there is no file."""
        try:
            word = self._path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None
        return None if word == NATURAL else float(word)

    def write(self, density: float | None) -> None:
        """Say what the next pass gets; a reader sees the old text or the new, never half."""
        fresh = self._path.with_suffix(".new")
        fresh.write_text(NATURAL if density is None else str(density), encoding="ascii")
        fresh.replace(self._path)


def main(device: Device | None = None) -> int:
    """Take our option out of the command line and become the drafter's service.

    Args:
        device: in the place of the first GPU; tests only.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--density-file", type=Path, required=True)
    options, sys.argv[1:] = parser.parse_known_args()
    planted = DensityFile(options.density_file)
    planted_serve = partial(serve, planted=planted, device=device)
    return run_service("bench.planted_drafter", __doc__, DrafterSettings, planted_serve)


if __name__ == "__main__":
    sys.exit(main())
