"""`python -m target_svc.llama.doctor`: load llama.cpp and print what it can do, as one JSON object.

Run by `target_svc.doctor` as a child, since a library that does not fit the machine may end the
process that loads it.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import Any

from skim.errors import SkimError
from target_svc.llama.library import Library


def examine() -> dict[str, Any]:
    """Give `ok`, `version` of the binding, `gpu` (whether the build can use one), or `error`."""
    try:
        version = metadata.version("llama-cpp-python")
        return {"ok": True, "version": version, "gpu": Library().has_gpu}
    except metadata.PackageNotFoundError:
        return {"ok": False, "error": "llama-cpp-python is not installed"}
    except SkimError as error:
        return {"ok": False, "error": error.message}
    except (OSError, RuntimeError, ImportError) as error:  # what the dynamic loader says
        return {"ok": False, "error": f"llama.cpp cannot be loaded: {error}"}


def main() -> int:
    """Print the report; 0 when the library works."""
    report = examine()
    print(json.dumps(report), flush=True)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
