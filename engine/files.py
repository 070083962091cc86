"""Files that are whole or absent, whatever ends the process."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import GigamorphError

# It can only be read by setting it, which is not for threads: once, at the start.
_UMASK = os.umask(0)
os.umask(_UMASK)


_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or name a folder on another file system",
}


def write_atomically(path: str | Path, write: Callable[[Path], object], what: str = "file") -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in the place of ``path`` in one step.

    Raises:
        GigamorphError: if it cannot be written (a full disk); a former file at ``path`` is untouched.
    """
    path = Path(path)
    _refuse_device(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as temporary:
            write(temporary)
            os.chmod(temporary, 0o666 & ~_UMASK)  # also of a library that makes its files private
    except Exception as error:
        number = _system_error(error)
        if number is None and not isinstance(error, OSError | RuntimeError):
            raise  # not of a file
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        kept = "; the former one is kept" if path.exists() else ""
        unknown = None if isinstance(error, OSError) else errno.ENOSPC  # torch's zip writer does not say it
        remedy = _REMEDIES.get(number or unknown, "name a folder that can be written")
        raise GigamorphError(f"{path}: the {what} cannot be written: {reason}{kept}; {remedy}") from error


@contextlib.contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, which becomes ``path`` if all goes well and is removed if not."""
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _host() -> str:
    """Whose numbers of processes these are: containers of one name may have their own."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:8]


_HOST = _host()
_START = secrets.token_hex(4)  # another process may have had the number of this one
_COUNT = itertools.count()
_TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-([0-9a-f]{8})[0-9a-f]+\.part(\.[^.]*)?")
_FORGOTTEN = 86_400.0  # seconds without a change, after which a file of a process that cannot be seen is left over
_seen: set[str] = set()  # folders


def temporary_name(path: Path) -> Path:
    """A new name beside ``path`` for a file or folder that is not whole yet.

    It says who writes it. The first one in a folder removes what processes that were killed have left there.
    """
    folder = os.path.abspath(path.parent)
    if folder not in _seen:
        _seen.add(folder)
        _remove_left_over(folder)
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{_START}{next(_COUNT):x}.part{path.suffix}")


def _remove_left_over(folder: str) -> None:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None or not _is_left_over(entry, found[1], int(found[2]), found[3]):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _is_left_over(entry: os.DirEntry[str], host: str, process: int, start: str) -> bool:
    if host == _HOST:
        if process == os.getpid():
            return start != _START
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _FORGOTTEN


def require_writable(path: str | Path, what: str = "file") -> None:
    """Say before long work what `write_atomically` would say after it, if a file cannot be written there.

    Raises:
        GigamorphError: it is a device, or its folder is a file, or must not be written to.
    """
    _refuse_device(Path(path))
    folder = next(parent for parent in Path(os.path.abspath(path)).parents if parent.exists())
    reason = errno.ENOTDIR if not folder.is_dir() else 0 if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES
    if reason == errno.EACCES and os.statvfs(folder).f_flag & os.ST_RDONLY:
        reason = errno.EROFS
    if reason:
        raise GigamorphError(
            f"{path}: the {what} cannot be written: {os.strerror(reason)}; name a folder that can be written"
        )


def _refuse_device(path: Path) -> None:
    """What is put in the place of /dev/null or /dev/stdout takes it from the whole system, where root may."""
    in_dev = Path(os.path.abspath(path)).parent == Path("/dev")
    if path.exists() and (in_dev or not (path.is_file() or path.is_dir())):
        raise GigamorphError(f"{path}: is a device or a pipe, in whose place the file would be put; name a file")


def _system_error(error: BaseException | None) -> int | None:
    """The system's number of an error, also where a library's own error hides it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if told := re.search(r"\(os error (\d+)\)", str(error)):  # as Rust's libraries (safetensors) write it
            return int(told[1])
        error = error.__cause__ or error.__context__
    return None
