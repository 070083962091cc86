"""Entry point of the command: it also handles a Ctrl-C during the import of the command line, and missing packages."""

import sys


def main() -> None:
    """Import and run the command line."""
    try:
        from .main import main

        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        needs = "install it, or all that gigamorph needs: pip install gigamorph"
        print(f"error: the package {error.name} is missing; {needs}", file=sys.stderr)
        sys.exit(1)
