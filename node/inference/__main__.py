"""`python -m node.inference` is the engine process."""

from node.importing import importing

with importing():
    from node.inference.process import main

main()
