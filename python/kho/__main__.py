"""`python -m kho` is `kho`."""

from .cli import main

main()
