"""Lock files that allow one process at a time in a folder, and name the holder to others."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import GigamorphError
from ..parsing import parse_json


@contextlib.contextmanager
def hold(path: Path, shown: Path, *, wait: bool = False, needed: bool = True) -> Iterator[None]:
    """Context that holds a lock file. The system releases the lock when the process ends, even after a crash.

    It uses record locks, which work over network file systems and which forked processes do not inherit.

    Args:
        path: the lock file.
        shown: the path in messages.
        wait: whether to wait for another holder; otherwise an error is raised.
        needed: whether a file system without locks is an error; otherwise no lock is held there.

    Raises:
        GigamorphError: naming the process that holds the lock, or if the file system does not support locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise cannot_write(shown, error, "name another --out") from error
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise GigamorphError(
                    f"{shown}: {_holder(path)} writes to it; wait for it, or name another --out"
                ) from error
            if needed:
                raise GigamorphError(
                    f"{shown}: cannot be locked ({os.strerror(error.errno or 0)}); name an --out on a file system with "
                    "locks"
                ) from error
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # the content only names the holder
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(me).encode(), 0)
        yield
    finally:
        os.close(handle)


def held(path: Path) -> str | None:
    """A description of the other process that holds a lock file, or None."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return _holder(path)
    finally:
        os.close(handle)
    return None


def cannot_write(path: Path, error: OSError, advice: str) -> GigamorphError:
    """The error for a file or folder that cannot be written, with `advice`, or to free space on a full disk."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return GigamorphError(f"{path}: cannot be written: {reason}; {'free some space' if full else advice}")


def _holder(path: Path) -> str:
    try:
        found = parse_json(path.read_text())
        return f"process {found['pid']} on {found['host']} (since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
