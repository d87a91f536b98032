"""`python -m node` is the `aigen` command."""

from node.cli import main

main()
