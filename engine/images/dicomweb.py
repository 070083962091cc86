"""Images in a DICOMweb store (PS3.18), by dicomweb-client: search, download of single images, upload of results.

A location in a store is its URL after ``dicomweb+``, as in ``dicomweb+https://host/dicom-web/studies/1.2.3`` or
``dicomweb+https://host/dicom-web/studies?StudyDate=20260101-``. User and password come from ~/.netrc.
"""

from __future__ import annotations

import functools
import io
import netrc
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from ..errors import DataError
from .rawfile import brief, library_errors, one_line
from .remote import RemoteFile, with_retries

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

T = TypeVar("T")
PREFIX = "dicomweb+"
_LOCATION = re.compile(
    r"dicomweb\+(?P<service>https?://[^?#]+?)(?P<studies>/studies(?:/(?P<study>[\d.]+))?)?"
    r"(?P<serieses>/series(?:/(?P<series>[\d.]+))?)?(?P<instances>/instances(?:/(?P<instance>[\d.]+))?)?/?"
    r"(?:\?(?P<query>[^#]*))?"
)
_PAGE = 500
"""The number of results per request of a search."""
_TIMEOUTS = 10, 120
"""Timeouts in seconds: for connecting, and between two parts of a response."""
_FRAMES = (("application/octet-stream", "*"),), ("application/octet-stream",), None
"""Media types to request frames in; the first one that the store supports is used."""
_LUT_DATA = "00283006"


class StoreUnreachableError(DataError):
    """The store is unreachable or out of order, independent of the request."""


def is_dicomweb(text: str) -> bool:
    """Whether it is a location in a DICOMweb store."""
    return text.startswith(PREFIX)


def remote_file(url: str) -> RemoteFile | None:
    """A remote file that is read by byte ranges or from memory; None if it must be downloaded first.

    Raises:
        DataError: if it cannot be reached.
    """
    return Instance(url) if is_dicomweb(url) else RemoteFile.by_region(url)


@dataclass(frozen=True)
class StoreLocation:
    """The location of a URL: a store, a study, a series, an instance, or a search in them."""

    service: str
    study: str | None
    series: str | None
    instance: str | None
    level: str
    """The level of a search: studies, series or instances."""
    filters: tuple[tuple[str, str], ...]

    def url(self, study: str, series: str, instance: str) -> str:
        """The URL of an instance in the same store."""
        return f"{PREFIX}{self.service}/studies/{study}/series/{series}/instances/{instance}"


def parse_location(url: str) -> StoreLocation:
    """Parse a URL.

    Raises:
        DataError: if it is not the URL of a DICOMweb store.
    """
    found = _LOCATION.fullmatch(url)
    if found is None:
        raise DataError(f"{url}: not a DICOMweb URL; write dicomweb+https://host/dicom-web/studies/UID, or a search")
    if "@" in found["service"].partition("://")[2].partition("/")[0]:
        raise DataError("a password in a URL would be written to all results; put it into ~/.netrc instead")
    filters = tuple(parse_qsl(found["query"] or "", keep_blank_values=True))
    for name, _ in filters:
        if name in ("limit", "offset", "includefield"):
            raise DataError(f"{url}: {name} is not a search attribute; remove it")
    level = "instances" if found["instances"] or found["series"] else "series" if found["serieses"] else "studies"
    if level == "studies" and found["study"]:
        level = "instances"
    own = (found["study"], found["series"], found["instance"])
    return StoreLocation(found["service"], *own, level, filters)


def search(url: str) -> Iterator[tuple[str, Dataset]]:
    """Iterate over (URL, metadata) of the images at a location, study by study; never all of them in memory.

    Segmentations, reports and other instances that are not images are left out.

    Raises:
        DataError: if the store cannot be reached or searched, or contains no image there; also during iteration.
    """
    from pydicom.datadict import tag_for_keyword
    from pydicom.uid import UID

    where, any_found = parse_location(url), False
    for name, _ in where.filters:
        if not (tag_for_keyword(name) or re.fullmatch(r"[\dA-Fa-f]{8}", name) or name == "fuzzymatching"):
            raise DataError(f"{url}: unknown DICOM attribute {name}; correct it, because stores ignore unknown ones")
    for found in _instances(url, where):
        name = UID(str(found.get("SOPClassUID", ""))).name
        if "Image Storage" not in name or "SOPInstanceUID" not in found:
            continue
        any_found = True
        study = str(found.get("StudyInstanceUID") or where.study)
        yield where.url(study, str(found.get("SeriesInstanceUID") or where.series), str(found.SOPInstanceUID)), found
    if not any_found:
        raise DataError(f"{url}: contains no images")


def _instances(url: str, where: StoreLocation) -> Iterator[Dataset]:
    within = {"study_instance_uid": where.study, "series_instance_uid": where.series}
    if where.level == "instances":
        yield from _pages(url, where.service, "search_for_instances", **within, search_filters=dict(where.filters))
        return
    one = "search_for_studies" if where.level == "studies" else "search_for_series"
    inside = {} if where.level == "studies" else {"study_instance_uid": where.study}
    for group in _pages(url, where.service, one, **inside, search_filters=dict(where.filters)):
        study = str(group.get("StudyInstanceUID") or where.study)
        own = {"study_instance_uid": study}
        if where.level == "series":
            own["series_instance_uid"] = str(group.SeriesInstanceUID)
        for found in _pages(url, where.service, "search_for_instances", **own):
            found.StudyInstanceUID = study
            if where.level == "series":
                found.SeriesInstanceUID = own["series_instance_uid"]
            yield found


def _pages(url: str, service: str, method: str, **chosen: Any) -> Iterator[Dataset]:
    """All results of a search, until a page is empty, because a store may return fewer results than requested."""
    from pydicom.dataset import Dataset

    offset, first = 0, None

    def ask(client: Any) -> list[tuple[Any, Dataset]]:
        page = getattr(client, method)(**chosen, limit=_PAGE, offset=offset or None)
        return [(one, Dataset.from_json(one)) for one in page]

    while True:
        page = ask_store(url, service, ask)
        if page and page[0][0] == first:
            if len(page) < _PAGE:
                return  # the store ignores the offset and has returned all results
            raise DataError(f"{url}: its store returns the same results at each offset; search for fewer images")
        if not page:
            return
        first = page[0][0]
        offset += len(page)
        yield from (found for _, found in page)


class Instance(RemoteFile):
    """An instance of a store, as a file: a single-frame instance is downloaded into memory when it is read.

    Args:
        url: the URL of the instance, as `search` returns it.

    Raises:
        DataError: if it is not the URL of an instance; all methods raise it if the instance cannot be downloaded.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        where = parse_location(url)
        if not (where.study and where.series and where.instance):
            raise DataError(f"{url}: not the URL of an image; write .../studies/UID/series/UID/instances/UID")
        self.service, self._uids = where.service, (where.study, where.series, where.instance)
        self._media = 0  # index into _FRAMES
        self._fetching = threading.Lock()
        self._data: memoryview | None = None

    def is_dir(self) -> bool:
        return False

    @functools.cached_property
    def header(self) -> Dataset:
        """The store's metadata, without pixels and other long values, which it returns by reference."""
        from pydicom.dataset import Dataset

        found = ask_store(self.url, self.service, lambda client: client.retrieve_instance_metadata(*self._uids))
        own = {tag: value for tag, value in found.items() if "BulkDataURI" not in value}

        def refuse_lut(tag: str, vr: str, uri: str) -> None:
            if tag == _LUT_DATA:
                raise DataError(f"{self.url}: its store returns the grey scale by reference; download the file")

        with library_errors(f"{self.url}: its store's metadata cannot be read", "download the file"):
            return Dataset.from_json(own, bulk_data_uri_handler=refuse_lut)

    @property
    def frames(self) -> int:
        with library_errors(f"{self.url}: its store's metadata cannot be read", "download the file"):
            return int(self.header.get("NumberOfFrames") or 1)

    def frame(self, number: int) -> bytes:
        """The bytes of a frame, from 1: as stored, otherwise uncompressed, otherwise in the store's preferred form."""

        def fetch(client: Any) -> Any:
            from requests import HTTPError

            while True:
                types = _FRAMES[self._media]
                try:
                    return client.retrieve_instance_frames(*self._uids, [number], media_types=types)
                except HTTPError as error:
                    if _status(error) not in (400, 406, 415, 501) or types is None:
                        raise
                    self._media = _FRAMES.index(types) + 1

        found = ask_store(f"{self.url}/frames/{number}", self.service, fetch)
        if len(found) != 1:
            raise DataError(f"{self.url}: its store sends {len(found)} frames instead of one; download the file")
        return bytes(found[0])

    @property
    def size(self) -> int:
        return len(self._file_bytes())

    def read_range(self, start: int, end: int) -> bytes:
        return bytes(self._file_bytes()[start:end])

    def fetch(self, start: int, end: int) -> bytes:
        return self.read_range(start, end)

    def _file_bytes(self) -> memoryview:
        from .dicom_file import without_validation

        with self._fetching:
            if self._data is None:
                found = ask_store(self.url, self.service, lambda client: client.retrieve_instance(*self._uids))
                file = io.BytesIO()
                with library_errors(f"{self.url}: is damaged in its store", "correct it there"), without_validation():
                    found.save_as(file, enforce_file_format=True)
                self._data = file.getbuffer()
            return self._data


def store(service: str, documents: Sequence[Dataset]) -> None:
    """Upload instances to a store.

    Args:
        service: see `service_of`.
        documents: the instances.

    Raises:
        StoreUnreachableError: if the store cannot be reached.
        DataError: if the store refuses an instance.
    """
    found = ask_store(service, service, lambda client: client.store_instances(documents))
    failed = list(found.get("FailedSOPSequence") or ())
    if failed:
        reason = int(failed[0].get("FailureReason") or 0)
        raise DataError(f"{service}: refused {len(failed)} of {len(documents)} instances (reason {reason:04X}H)")


def service_of(url: str) -> str:
    """The URL of a store for results.

    Raises:
        DataError: if it is not the URL of a store, cannot be reached, or libraries are missing.
    """
    where = parse_location(url)
    if where.study or where.series or where.instance or where.filters:
        raise DataError(
            f"{url}: results go to a store, into the study of their image; write dicomweb+https://host/dicom-web"
        )
    try:
        import highdicom  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise DataError("DICOM results need highdicom: pip install 'gigamorph[dicomweb]'") from error
    ask_store(url, where.service, lambda client: client.search_for_studies(limit=1))
    return where.service


def ask_store(url: str, service: str, call: Callable[[Any], T]) -> T:
    """The response of a store, after at most three tries.

    Args:
        url: for messages.
        service: the URL of the store.
        call: sends the request with a client.

    Raises:
        StoreUnreachableError: if the store cannot be reached, is out of order or requires a login.
        DataError: if the store refuses the request.
    """
    client = _client(service, os.getpid(), threading.get_ident())
    return with_retries(url, lambda: call(client), _judge)


def _judge(url: str, error: Exception) -> tuple[DataError, bool]:
    """The error to raise for an error of a request, and whether another try may succeed."""
    import requests

    if isinstance(error, requests.HTTPError):
        status, reason = _status(error), getattr(error.response, "reason", "") or ""
        text = f"{url}: its store answers {status} {brief(reason)}".rstrip()
        if status in (401, 403):
            return StoreUnreachableError(f"{text}; put user and password for it into ~/.netrc"), False
        kind = StoreUnreachableError if status in (408, 429, 502, 503, 504) else DataError
        return kind(text), status >= 500 or status in (408, 429)
    if isinstance(error, requests.RequestException):
        final = StoreUnreachableError(f"{url}: its store cannot be reached ({_cause(error)})")
        return final, not isinstance(error, requests.exceptions.InvalidURL)
    # errors of pydicom and json for a malformed response
    return DataError(f"{url}: its store's answer cannot be read ({one_line(error)})"), False


def _status(error: Any) -> int:
    return getattr(error.response, "status_code", None) or 500


def _cause(error: BaseException) -> str:
    """The message of the root cause of an error of requests, whose own message names internal objects."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or one_line(error)  # pyright: ignore[reportArgumentType]


@functools.cache
def _client(service: str, process: int, thread: int) -> Any:
    """The client of a store for a thread of a process, because forked processes must not share connections."""
    return connect(service)


def connect(service: str) -> Any:
    """Create a client of dicomweb-client for a store.

    Raises:
        DataError: if dicomweb-client is missing, or the URL is invalid.
    """
    try:
        from dicomweb_client import DICOMwebClient
    except ImportError as error:
        raise DataError("DICOMweb needs dicomweb-client: pip install 'gigamorph[dicomweb]'") from error
    from requests import Session

    class StoreSession(Session):
        """A session that does not encode wildcards and commas of searches, because Orthanc does not decode them.

        It logs in only if .netrc lists the host: tables may contain any host, and "default" would match all of them.
        """

        def prepare_request(self, request: Any) -> Any:
            request.auth = _login(request.url) or _no_login
            return super().prepare_request(request)

        def rebuild_auth(self, prepared_request: Any, response: Any) -> None:  # for redirects, maybe to another host
            prepared_request.headers.pop("Authorization", None)
            prepared_request.prepare_auth(_login(prepared_request.url) or _no_login)

        def request(self, method: Any, url: Any, *args: Any, **options: Any) -> Any:
            path, mark, query = str(url).partition("?")
            for code, sign in (("%2A", "*"), ("%3F", "?"), ("%2C", ",")):
                query = query.replace(code, sign)
            return super().request(method, path + mark + query, *args, **options)

    try:
        client = DICOMwebClient(service, session=StoreSession(), timeout=_TIMEOUTS)
    except ValueError as error:
        raise DataError(f"{service}: not the URL of a DICOMweb store ({one_line(error)})") from error
    client.set_http_retry_params(retry=False)
    return client


def _login(url: str) -> tuple[str, str] | None:
    """User and password for the host of a URL in .netrc; "default" is ignored."""
    from requests.utils import get_netrc_auth

    host = urlsplit(url).hostname
    paths = map(os.path.expanduser, [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"])
    try:
        path = next(filter(os.path.exists, paths), None)
        return get_netrc_auth(url) if path is not None and host in netrc.netrc(path).hosts else None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None


def _no_login(prepared: Any) -> Any:
    """An authentication without login, which keeps requests from looking for one."""
    return prepared
