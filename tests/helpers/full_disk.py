"""A real full disk: the system refuses what goes beyond a limit on the size of a file."""

import subprocess
import sys

_LIMITED = (
    "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    "limit = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit));"
    "from gigamorph.cli.main import main; main()"
)


def run_within(limit, *command, cwd=None):
    """`gigamorph COMMAND` in a process that can write no file of more bytes than the limit."""
    words = [sys.executable, "-c", _LIMITED, limit, *command]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd)
