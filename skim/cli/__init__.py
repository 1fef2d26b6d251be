"""The command line: `skim up`, `ask`, `demo`, `doctor`, and what looks after running services."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `skim` program."""
    # Imported here: the services' launcher passes through this package and needs none of it.
    from skim.cli.app import app

    app(prog_name="skim")
