"""Files that are whole or absent, whatever ends the process."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import GigamorphError

# It can only be read by setting it, which is not for threads: once, at the start.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: str | Path, write: Callable[[Path], object], what: str = "file") -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in the place of ``path`` in one step.

    Raises:
        GigamorphError: if it cannot be written (a full disk); a former file at ``path`` is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        os.chmod(temporary, 0o666 & ~_UMASK)  # temporary files are private, what the user asked for is not
        os.replace(temporary, path)
    # torch's zip writer turns ENOSPC into a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
        kept = "; the former one is kept" if path.exists() else ""
        full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "name a folder that can be written"
        raise GigamorphError(f"{path}: the {what} cannot be written: {reason}{kept}; {remedy}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
