"""Where the bundled models lie, and a check of model paths before any process is started.

The `models` package is found by name, not imported: it may be a folder of a checkout or of an
installed wheel. Refuses paths that are not there and files that are not GGUF.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from skim.errors import ModelFileError, PreconditionFailed

TARGET = "skim-target.gguf"
DRAFTER = "skim-drafter.gguf"
CROSS_DRAFTER = "skim-drafter-cross.gguf"


def bundled_model(name: str) -> Path:
    """Path of a bundled model file.

    Raises:
        PreconditionFailed: the `models` package or the file is missing from this installation.
    """
    spec = importlib.util.find_spec("models")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / name
        if path.is_file():
            return path
    raise PreconditionFailed(
        f"the bundled model {name} is not part of this installation",
        reason="BUNDLED_MODEL_MISSING",
        got="no such file in the package `models`",
        allowed="an installation with its models, or --target and --drafter",
    )


def check_model_path(path: Path, field: str) -> Path:
    """Refuse a path that cannot be a GGUF; the service reads the rest of it.

    Raises:
        ModelFileError: not there, not readable, or without the GGUF magic.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(
            f"{field} {path}: {error.strerror}", field=field, got=str(path), allowed="a GGUF file"
        ) from None
    if magic != b"GGUF":
        raise ModelFileError(
            f"{field} {path} is not a GGUF file: it starts with {magic!r}",
            field=field,
            got=repr(magic),
            allowed="a file that starts with b'GGUF'",
        )
    return path.resolve()
