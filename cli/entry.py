"""Entry point of the command: it also handles a Ctrl-C during the import of the command line."""

import sys


def main() -> None:
    """Import and run the command line."""
    try:
        from .main import main
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    main()
