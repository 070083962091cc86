"""Where the command begins: a Ctrl-C while the command line itself is imported ends it like any other."""

import sys


def main() -> None:
    """The command line, once it is imported."""
    try:
        from .main import main
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    main()
