"""Regenerate the stubs in `skim/v1/` from `protos/skim/v1/*.proto`.

Run as `make protos`. A test runs it into a scratch folder and compares, so stubs never go stale.
Beside the Python stubs it writes `skim.binpb`, a descriptor set (comments included) from which
clients in other languages can be built without this repository.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
PACKAGE = "skim/v1"


def generate(out_root: Path) -> None:
    """Write stubs and descriptor set under `out_root / skim / v1`."""
    out = out_root / PACKAGE
    out.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / PACKAGE).glob("*.proto"))
    well_known = str(files("grpc_tools") / "_proto")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTOS}",
            f"-I{well_known}",
            f"--python_out={out_root}",
            f"--pyi_out={out_root}",
            f"--grpc_python_out={out_root}",
            "--include_imports",
            "--include_source_info",
            f"--descriptor_set_out={out / 'skim.binpb'}",
            *sources,
        ],
        check=True,
        cwd=PROTOS,
    )
    (out / "__init__.py").write_text('"""Generated from protos/skim/v1 by `make protos`."""\n')


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
