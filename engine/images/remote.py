"""Image files that fsspec reaches (https, s3, gcs, memory, ...), read by byte ranges as the formats ask for them."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..errors import DataError
from .rawfile import one_line

T = TypeVar("T")
_TRIES = 3
SMALL = 2**25
"""Bytes of a file up to which it is fetched at once: many small requests take longer."""
BLOCK = 2**20
"""Bytes that are fetched together of a larger file."""
_HELD = 16  # blocks
_REFERENCE = re.compile(r"(?<![^:/])reference:(//|:)", re.IGNORECASE)
_WITH_RANGES: dict[str, bool] = {}  # of web servers that were asked
# What a further try does not change; each file system has its own errors besides.
_FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError, NotADirectoryError)


def is_url(text: str) -> bool:
    """Whether fsspec is to find it, as in https://host/a.dcm and zip://a.dcm::b.zip."""
    return "://" in text


def tried(url: str, call: Callable[[], T]) -> T:
    """What a call gives that goes over a network, at the third try at the latest.

    Raises:
        DataError: that the file cannot be fetched, and why; or what the call raises.
    """
    for left in reversed(range(_TRIES)):
        try:
            return call()
        except DataError:
            raise
        except Exception as error:
            if not left or (isinstance(error, _FINAL) and _status(error) < 500):
                raise DataError(f"{url}: cannot be fetched ({said(error)})") from error
            time.sleep(0.2 * 4 ** (_TRIES - 1 - left))
    raise AssertionError


def said(error: Exception) -> str:
    """An error of a file system, in one line."""
    cause = error.__cause__
    if _status(error) >= 500 and isinstance(cause, Exception):
        error = cause
    return f"{type(error).__name__}: {one_line(error)}"


def _status(error: Exception) -> int:
    """Of HTTP, where fsspec says of whatever goes wrong that there is no such file; 0 of others.

    A host that cannot be reached counts as one that is out of order (503), as does one that asks for patience.
    """
    if not isinstance(error, FileNotFoundError) or error.__cause__ is None:
        return 0
    status = getattr(error.__cause__, "status", 503)
    return 503 if status in (408, 429) else status


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        DataError: it is fsspec's ``reference``, whose files hold templates of Jinja, which many versions run as code.
    """
    import fsspec

    if _REFERENCE.search(url):
        raise DataError(f"{url}: a file of references may run code, and is not opened; name the files it refers to")
    return fsspec.url_to_fs(url)


class RemoteFile:
    """A file, or a zarr folder, elsewhere: as much of a `Path` as the readers of images need. Picklable as its URL.

    Raises:
        DataError: if it cannot be had, or its server knows no byte ranges.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._system: Any = None
        self._process = 0
        self._size: int | None = None
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    @classmethod
    def by_region(cls, url: str) -> RemoteFile | None:
        """The file, if parts of it can be fetched alone; None if it is to be fetched whole.

        That is what stands in an archive (`zip://a.dcm::b.zip`), which is unpacked from its beginning, and what is not
        small on a server without byte ranges.

        Raises:
            DataError: if it cannot be reached.
        """
        if "::" in url:
            return None
        file = cls(url)
        return file if file.is_dir() or file._ranges() else None

    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemoteFile:
        return RemoteFile(f"{self.url.rstrip('/')}/{name}")

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.url.split("/"))

    def is_dir(self) -> bool:
        if not self.url.rstrip("/").lower().endswith(".zarr"):  # to look for folders would be a request for each image
            return False
        return tried(self.url, lambda: self._open_system().isdir(self._path))

    def is_file(self) -> bool:
        if ".zarr/" not in self.url.lower():
            return True  # else opening it says why not
        return tried(self.url, lambda: self._open_system().isfile(self._path))

    def exists(self) -> bool:
        return True

    def stat(self) -> Any:
        return SimpleNamespace(st_size=self.size)

    @property
    def size(self) -> int:
        if self._size is None:
            self._size = tried(self.url, lambda: self._open_system().info(self._path)).get("size")
        if self._size is None:
            raise DataError(f"{self.url}: its server does not say how large it is; fetch it")
        return self._size

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """A seekable binary file; ``buffering=0`` has no buffer beyond the blocks that are fetched."""
        raw = _Reader(self)
        return io.BufferedReader(raw) if buffering else raw

    def read_bytes(self) -> bytes:
        return self.some(0, self.size) if self.size <= SMALL else self.fetch(0, self.size)

    def some(self, start: int, end: int) -> bytes:
        """Bytes from one place on; to another, or to the end of what is fetched together."""
        size = self.size
        end = min(end, size)
        if start >= end:
            return b""
        block = size if size <= SMALL else BLOCK
        if end - start >= block < size:
            return self.fetch(start, end)
        number = start // block
        with self._lock:  # so that two threads do not fetch the same
            found = self._blocks.pop(number, None)
            if found is None:
                found = self.fetch(number * block, min((number + 1) * block, size))
            self._blocks[number] = found
            while len(self._blocks) > _HELD:
                self._blocks.popitem(last=False)
        return found[start - number * block : end - number * block]

    def fetch(self, start: int, end: int) -> bytes:
        """Bytes from one place to another, anew."""
        system, whole = self._open_system(), (start, end) == (0, self.size)
        part = {} if whole else {"start": start, "end": end}
        data = tried(self.url, lambda: system.cat_file(self._path, **part))
        if len(data) != end - start:
            raise DataError(
                f"{self.url}: its server sends {len(data)} bytes where {end - start} were asked for; fetch it"
            )
        return data

    def _ranges(self) -> bool:
        """Whether parts can be fetched."""
        info = tried(self.url, lambda: self._open_system().info(self._path))
        self._size = info.get("size")
        if self._size is None or self._size <= SMALL or not self.url.startswith(("http://", "https://")):
            return self._size is not None
        host = urlsplit(self.url).netloc
        if host not in _WITH_RANGES:
            _WITH_RANGES[host] = tried(self.url, self._last_byte)
        return _WITH_RANGES[host]

    def _last_byte(self) -> bool:
        """Whether it can be had without those before it."""
        with self._open_system().open(self._path, "rb", cache_type="none") as file:
            try:
                file.seek(self.size - 1)
                return len(file.read(1)) == 1
            except ValueError:  # as fsspec says it
                return False

    def _open_system(self) -> Any:
        if self._process != os.getpid():  # connections do not go over to forked processes
            self._system, self._path = file_system(self.url)
            self._process = os.getpid()
        return self._system


class _Reader(io.RawIOBase):
    """A stream over a remote file."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self.name = str(file)
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target):  # unbuffered files of this machine give all that is asked for, too
            data = self._file.some(self._place, self._place + len(target) - done)
            if not data:
                break
            target[done : done + len(data)] = data
            done += len(data)
            self._place += len(data)
        return done
