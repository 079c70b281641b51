"""python -m less_fast: the command `less-kv`."""

from .cli import main

main()
