"""`python -m skim.cli`, the same as the `skim` program."""

from skim.cli import main

main()
