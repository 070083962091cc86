"""Remote image files of fsspec (https, s3, gcs, memory, ...), read by byte ranges on demand."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fsspec.spec import AbstractBufferedFile

from ..errors import DataError
from .rawfile import one_line

T = TypeVar("T")
_TRIES = 3
SMALL = 2**25
"""The maximum bytes of a file that is fetched at once, because many small requests take longer."""
BLOCK = 2**20
"""The bytes per request of a larger file."""
_HELD = 16  # blocks
_REFERENCE = re.compile(r"(?<![^:/])reference:(//|:)", re.IGNORECASE)
_WITH_RANGES: dict[str, bool] = {}  # whether a web server supports byte ranges
# Errors that a retry does not change; file systems may have others.
_FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError, NotADirectoryError)


def is_url(text: str) -> bool:
    """Whether it is a URL for fsspec, such as https://host/a.dcm and zip://a.dcm::b.zip."""
    return "://" in text


def _judge(url: str, error: Exception) -> tuple[DataError, bool]:
    final = isinstance(error, _FINAL) and _status(error) < 500
    return DataError(f"{url}: cannot be fetched ({describe_error(error)})"), not final


def with_retries(
    url: str, call: Callable[[], T], judge: Callable[[str, Exception], tuple[DataError, bool]] = _judge
) -> T:
    """The result of a network call, after at most three tries.

    Args:
        url: for messages.
        call: the call.
        judge: (url, error of the call) -> the error to raise, and whether another try may succeed.

    Raises:
        DataError: if the file cannot be fetched, with the reason; or that of the call.
    """
    for left in reversed(range(_TRIES)):
        try:
            return call()
        except DataError:
            raise
        except Exception as error:
            final, may_succeed = judge(url, error)
            if not left or not may_succeed:
                raise final from error
            time.sleep(0.2 * 4 ** (_TRIES - 1 - left))
    raise AssertionError


def describe_error(error: Exception) -> str:
    """The type and message of a file system's error, in one line."""
    cause = error.__cause__
    if _status(error) >= 500 and isinstance(cause, Exception):
        error = cause
    return f"{type(error).__name__}: {one_line(error)}"


def _status(error: Exception) -> int:
    """The HTTP status of an error, because fsspec raises FileNotFoundError for all failures; 0 for others.

    An unreachable host counts as out of order (503), and so do timeouts (408) and too many requests (429).
    """
    if not isinstance(error, FileNotFoundError) or error.__cause__ is None:
        return 0
    status = getattr(error.__cause__, "status", 503)
    return 503 if status in (408, 429) else status


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        DataError: for fsspec's ``reference``, whose files may contain Jinja templates, which many versions run as code.
    """
    import fsspec

    if _REFERENCE.search(url):
        raise DataError(f"{url}: cannot be opened because a file of references may run code; pass the files in it")
    return fsspec.url_to_fs(url)


class RemoteFile:
    """A remote file or zarr folder, with the methods of `Path` that image readers use; pickled as its URL.

    Raises:
        DataError: if it cannot be fetched, or its server does not support byte ranges.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._system: Any = None
        self._process = 0
        self._size: int | None = None
        self._lock = threading.Lock()
        self._blocks: Any = None

    @classmethod
    def by_region(cls, url: str) -> RemoteFile | None:
        """The file, if it can be fetched by byte ranges; None if it must be fetched whole.

        The latter are files in archives (`zip://a.dcm::b.zip`), which are unpacked from the start, and large files on a
        server without byte ranges.

        Raises:
            DataError: if it cannot be reached.
        """
        if "::" in url:
            return None
        file = cls(url)
        return file if file.is_dir() or file._supports_ranges() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemoteFile:
        return RemoteFile(f"{self.url.rstrip('/')}/{name}")

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.url.split("/"))

    def is_dir(self) -> bool:
        if not self.url.rstrip("/").lower().endswith(".zarr"):  # saves a request per image
            return False
        return with_retries(self.url, lambda: self._open_system().isdir(self._path))

    def is_file(self) -> bool:
        if ".zarr/" not in self.url.lower():
            return True  # otherwise opening it reports the reason
        return with_retries(self.url, lambda: self._open_system().isfile(self._path))

    def exists(self) -> bool:
        return True

    def stat(self) -> Any:
        return SimpleNamespace(st_size=self.size)

    @property
    def size(self) -> int:
        if self._size is None:
            self._size = with_retries(self.url, lambda: self._open_system().info(self._path)).get("size")
        if self._size is None:
            raise DataError(f"{self.url}: its server does not report the size; download it")
        return self._size

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """A seekable binary file; ``buffering=0`` has no buffer in addition to the fetched blocks."""
        raw = _Reader(self)
        return io.BufferedReader(raw) if buffering else raw

    def read_bytes(self) -> bytes:
        return self.read_range(0, self.size) if self.size <= SMALL else self.fetch(0, self.size)

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, or to the end of the file; blocks are cached."""
        from fsspec.caching import BlockCache

        size = self.size
        end = min(end, size)
        block = size if size <= SMALL else BLOCK
        if end - start >= block < size:
            return self.fetch(start, end)
        with self._lock:  # two threads must not fetch the same block
            if self._blocks is None:
                self._blocks = BlockCache(block, lambda first, last: self.fetch(first, min(last, size)), size, _HELD)
            return self._blocks._fetch(start, end)

    def fetch(self, start: int, end: int) -> bytes:
        """Fetch the bytes from `start` to `end`, without the cache."""
        system, whole = self._open_system(), (start, end) == (0, self.size)
        part = {} if whole else {"start": start, "end": end}
        data = with_retries(self.url, lambda: system.cat_file(self._path, **part))
        if len(data) != end - start:
            raise DataError(f"{self.url}: its server sends {len(data)} bytes instead of {end - start}; download it")
        return data

    def _supports_ranges(self) -> bool:
        """Whether byte ranges can be fetched."""
        info = with_retries(self.url, lambda: self._open_system().info(self._path))
        self._size = info.get("size")
        if self._size is None or self._size <= SMALL or not self.url.startswith(("http://", "https://")):
            return self._size is not None
        host = urlsplit(self.url).netloc
        if host not in _WITH_RANGES:
            _WITH_RANGES[host] = with_retries(self.url, self._can_fetch_last_byte)
        return _WITH_RANGES[host]

    def _can_fetch_last_byte(self) -> bool:
        """Whether the last byte can be fetched without the others."""
        with self._open_system().open(self._path, "rb", cache_type="none") as file:
            try:
                file.seek(self.size - 1)
                return len(file.read(1)) == 1
            except ValueError:  # fsspec's error for a server without byte ranges
                return False

    def _open_system(self) -> Any:
        if self._process != os.getpid():  # forked processes must not share connections
            self._system, self._path = file_system(self.url)
            self._process = os.getpid()
        return self._system


class _Reader(AbstractBufferedFile):
    """A stream over a remote file."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__(None, file.url, cache_type="none", size=file.size)
        self.name, self._file = file.url, file

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._file.read_range(start, end)
