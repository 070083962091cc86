"""Atomic writes: a file is complete or absent, even if the process is killed."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import GigamorphError

# Reading the umask requires setting it, which is not thread-safe: done once, at import.
_UMASK = os.umask(0)
os.umask(_UMASK)


_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or choose a folder on another file system",
}


def write_atomically(path: str | Path, write: Callable[[Path], object], what: str = "file") -> None:
    """Let ``write`` fill a temporary file in the folder of ``path``, then rename it to ``path``.

    Args:
        path: the final file.
        write: writes a file at the path that it gets.
        what: description of the file for messages.

    Raises:
        GigamorphError: the file cannot be written (a full disk); an existing file at ``path`` is unchanged.
    """
    path = Path(path)
    _refuse_device(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as temporary:
            write(temporary)
            os.chmod(temporary, 0o666 & ~_UMASK)  # some libraries create private files
    except Exception as error:
        number = _system_error(error)
        if number is None and not isinstance(error, OSError | RuntimeError):
            raise  # not an error of a file
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        unchanged = "; the existing file is unchanged" if path.exists() else ""
        unknown = None if isinstance(error, OSError) else errno.ENOSPC  # torch's zip writer does not report it
        remedy = _REMEDIES.get(number or unknown, "choose a writable folder")
        raise GigamorphError(f"{path}: the {what} cannot be written: {reason}{unchanged}; {remedy}") from error


def write_json(path: Path, values: Any, what: str) -> None:
    """Write indented JSON by `write_atomically`."""
    text = json.dumps(values, indent=1) + "\n"
    write_atomically(path, lambda part: part.write_text(text), what)


def write_tensors(path: Path, tensors: Mapping[str, Any], what: str, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file by `write_atomically`; tensors that share memory are stored separately."""
    from safetensors.torch import save_file

    apart = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda part: save_file(apart, part, metadata), what)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], what: str) -> None:
    """Write a csv file with the columns of the first row by `write_atomically`."""

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write, what)


@contextlib.contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path`` for a file or folder.

    It replaces ``path`` on success, and is removed on an error.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        if temporary.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


def _host() -> str:
    """Identifies the process-ID namespace: containers with the same host name may have different ones."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:8]


_HOST = _host()
_START = secrets.token_hex(4)  # an earlier process may have had the same process ID
_COUNT = itertools.count()
_TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-([0-9a-f]{8})[0-9a-f]+\.part(\.[^.]*)?")
_STALE_SECONDS = 86_400.0  # a file of an invisible process is a leftover if it is unchanged for this long
_seen: set[str] = set()  # folders


def temporary_name(path: Path) -> Path:
    """A new path in the folder of ``path`` for a file or folder that is still incomplete.

    The name identifies the process. The first call for a folder removes leftovers of killed processes.
    """
    folder = os.path.abspath(path.parent)
    if folder not in _seen:
        _seen.add(folder)
        _remove_leftovers(folder)
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{_START}{next(_COUNT):x}.part{path.suffix}")


def _remove_leftovers(folder: str) -> None:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None or not _is_leftover(entry, found[1], int(found[2]), found[3]):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _is_leftover(entry: os.DirEntry[str], host: str, process: int, start: str) -> bool:
    if host == _HOST:
        if process == os.getpid():
            return start != _START
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_SECONDS


def require_writable(path: str | Path, what: str = "file") -> None:
    """Check before long work that `write_atomically` can write a file.

    Raises:
        GigamorphError: the path is a device, or its folder is a file or not writable.
    """
    _refuse_device(Path(path))
    folder = next(parent for parent in Path(os.path.abspath(path)).parents if parent.exists())
    reason = errno.ENOTDIR if not folder.is_dir() else 0 if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES
    if reason == errno.EACCES and os.statvfs(folder).f_flag & os.ST_RDONLY:
        reason = errno.EROFS
    if reason:
        raise GigamorphError(f"{path}: the {what} cannot be written: {os.strerror(reason)}; choose a writable folder")


def _refuse_device(path: Path) -> None:
    """Refuse devices: run as root, a rename to /dev/null or /dev/stdout would replace it for the whole system."""
    in_dev = Path(os.path.abspath(path)).parent == Path("/dev")
    if path.exists() and (in_dev or not (path.is_file() or path.is_dir())):
        raise GigamorphError(f"{path}: is a device or a pipe, which the file would replace; choose a file name")


def _system_error(error: BaseException | None) -> int | None:
    """The errno of an error, also if a library's error wraps it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # the format of Rust libraries (safetensors)
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None
