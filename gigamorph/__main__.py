"""`python -m gigamorph`: the command line."""

from .cli.main import main

main()
