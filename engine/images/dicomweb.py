"""Images in a DICOMweb store (PS3.18), through dicomweb-client: searched for, fetched one at a time, results stored.

A place in a store is its own URL after ``dicomweb+``, as in ``dicomweb+https://host/dicom-web/studies/1.2.3`` or
``dicomweb+https://host/dicom-web/studies?StudyDate=20260101-``. User and password are those of ~/.netrc.
"""

from __future__ import annotations

import io
import netrc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from ..errors import DataError
from .rawfile import brief, one_line
from .remote import RemoteFile

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

T = TypeVar("T")
PREFIX = "dicomweb+"
_PLACE = re.compile(
    r"dicomweb\+(?P<service>https?://[^?#]+?)(?P<studies>/studies(?:/(?P<study>[\d.]+))?)?"
    r"(?P<serieses>/series(?:/(?P<series>[\d.]+))?)?(?P<instances>/instances(?:/(?P<instance>[\d.]+))?)?/?"
    r"(?:\?(?P<query>[^#]*))?"
)
_PAGE = 500
"""Results of a search that are asked for at once."""
_TRIES = 3
_PATIENCE = 10, 120
"""Seconds until a connection stands, and between two pieces of an answer."""
_FRAMES = (("application/octet-stream", "*"),), ("application/octet-stream",), None
"""Media types that frames are asked for in, the first that the store has."""
_LUT_DATA = "00283006"
_local = threading.local()


class StoreUnreachableError(DataError):
    """The store, not what was asked of it, is the reason."""


def is_dicomweb(text: str) -> bool:
    """Whether it is to be found in a DICOMweb store."""
    return text.startswith(PREFIX)


def remote_file(url: str) -> RemoteFile | None:
    """A file elsewhere, if parts of it can be fetched alone or it is held in memory; None if it is to be copied.

    Raises:
        DataError: if it cannot be reached.
    """
    return Instance(url) if is_dicomweb(url) else RemoteFile.by_region(url)


@dataclass(frozen=True)
class Place:
    """What a URL names: a whole store, a study, a series, an instance, or what a search in them finds."""

    service: str
    study: str | None
    series: str | None
    instance: str | None
    level: str
    """Of a search: studies, series or instances."""
    filters: tuple[tuple[str, str], ...]

    def url(self, study: str, series: str, instance: str) -> str:
        """Of an instance of the same store."""
        return f"{PREFIX}{self.service}/studies/{study}/series/{series}/instances/{instance}"


def place_of(url: str) -> Place:
    """What a URL names.

    Raises:
        DataError: if it is none of a DICOMweb store.
    """
    found = _PLACE.fullmatch(url)
    if found is None:
        raise DataError(f"{url}: is no DICOMweb place; write dicomweb+https://host/dicom-web/studies/UID, or a search")
    if "@" in found["service"].partition("://")[2].partition("/")[0]:
        raise DataError("a password in a URL would stand in all results; put it into ~/.netrc, and leave it out")
    filters = tuple(parse_qsl(found["query"] or "", keep_blank_values=True))
    for name, _ in filters:
        if name in ("limit", "offset", "includefield"):
            raise DataError(f"{url}: {name} is no attribute to search for; leave it out")
    level = "instances" if found["instances"] or found["series"] else "series" if found["serieses"] else "studies"
    if level == "studies" and found["study"]:
        level = "instances"
    own = (found["study"], found["series"], found["instance"])
    return Place(found["service"], *own, level, filters)


def search(url: str) -> Iterator[tuple[str, Dataset]]:
    """(URL, what the store says of it) of each image at a place, study by study; never all of them in memory.

    Segmentations, reports and other instances that are no images are left out.

    Raises:
        DataError: if the store cannot be reached or searched, or holds no image there; also while they are taken.
    """
    from pydicom.datadict import tag_for_keyword
    from pydicom.uid import UID

    place, any_found = place_of(url), False
    for name, _ in place.filters:
        if not (tag_for_keyword(name) or re.fullmatch(r"[\dA-Fa-f]{8}", name) or name == "fuzzymatching"):
            raise DataError(f"{url}: {name} is no attribute of DICOM, and stores pass over what they do not know")
    for found in _instances(url, place):
        name = UID(str(found.get("SOPClassUID", ""))).name
        if "Image Storage" not in name or "SOPInstanceUID" not in found:
            continue
        any_found = True
        study = str(found.get("StudyInstanceUID") or place.study)
        yield place.url(study, str(found.get("SeriesInstanceUID") or place.series), str(found.SOPInstanceUID)), found
    if not any_found:
        raise DataError(f"{url}: holds no images")


def _instances(url: str, place: Place) -> Iterator[Dataset]:
    within = {"study_instance_uid": place.study, "series_instance_uid": place.series}
    if place.level == "instances":
        yield from _pages(url, place.service, "search_for_instances", **within, search_filters=dict(place.filters))
        return
    one = "search_for_studies" if place.level == "studies" else "search_for_series"
    inside = {} if place.level == "studies" else {"study_instance_uid": place.study}
    for group in _pages(url, place.service, one, **inside, search_filters=dict(place.filters)):
        study = str(group.get("StudyInstanceUID") or place.study)
        own = {"study_instance_uid": study}
        if place.level == "series":
            own["series_instance_uid"] = str(group.SeriesInstanceUID)
        for found in _pages(url, place.service, "search_for_instances", **own):
            found.StudyInstanceUID = study
            if place.level == "series":
                found.SeriesInstanceUID = own["series_instance_uid"]
            yield found


def _pages(url: str, service: str, method: str, **chosen: Any) -> Iterator[Dataset]:
    """All results of a search. A store may give fewer at once than it is asked for, so that an empty page ends it."""
    from pydicom.dataset import Dataset

    offset, first = 0, None

    def ask(client: Any) -> list[tuple[Any, Dataset]]:
        page = getattr(client, method)(**chosen, limit=_PAGE, offset=offset or None)
        return [(one, Dataset.from_json(one)) for one in page]

    while True:
        page = asked(url, service, ask)
        if page and page[0][0] == first:
            if len(page) < _PAGE:
                return  # all of it, whatever the offset
            raise DataError(f"{url}: its store gives the same results at each offset; name fewer at once")
        if not page:
            return
        first = page[0][0]
        offset += len(page)
        yield from (found for _, found in page)


class Instance(RemoteFile):
    """An instance of a store, as a file: one of a single frame is fetched whole, into memory, when it is read.

    Args:
        url: of the instance, as `search` gives it.

    Raises:
        DataError: if it is no instance's; in all methods if it cannot be had.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        place = place_of(url)
        if not (place.study and place.series and place.instance):
            raise DataError(f"{url}: is no image; name .../studies/UID/series/UID/instances/UID")
        self.service, self._uids = place.service, (place.study, place.series, place.instance)
        self._asking = 0  # of _FRAMES
        self._fetching = threading.Lock()
        self._data: memoryview | None = None

    def is_dir(self) -> bool:
        return False

    @cached_property
    def header(self) -> Dataset:
        """What the store says of it, without pixels and other long values, which it gives by reference."""
        from pydicom.dataset import Dataset

        found = asked(self.url, self.service, lambda client: client.retrieve_instance_metadata(*self._uids))
        own = {tag: value for tag, value in found.items() if "BulkDataURI" not in value}

        def inside(tag: str, vr: str, uri: str) -> None:
            if tag == _LUT_DATA:
                raise DataError(f"{self.url}: its store gives the grey scale by reference alone; download the file")

        try:
            return Dataset.from_json(own, bulk_data_uri_handler=inside)
        except DataError:
            raise
        except Exception as error:  # pydicom has many
            raise DataError(f"{self.url}: its store's metadata cannot be read ({one_line(error)})") from error

    @property
    def frames(self) -> int:
        try:
            return int(self.header.get("NumberOfFrames") or 1)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.url}: its store's metadata cannot be read ({one_line(error)})") from error

    def frame(self, number: int) -> bytes:
        """A frame, from 1: as it is stored, else uncompressed, else as the store likes best."""

        def fetch(client: Any) -> Any:
            from requests import HTTPError

            while True:
                types = _FRAMES[self._asking]
                try:
                    return client.retrieve_instance_frames(*self._uids, [number], media_types=types)
                except HTTPError as error:
                    if _status(error) not in (400, 406, 415, 501) or types is None:
                        raise
                    self._asking = _FRAMES.index(types) + 1

        found = asked(f"{self.url}/frames/{number}", self.service, fetch)
        if len(found) != 1:
            raise DataError(f"{self.url}: its store sends {len(found)} frames where one was asked for")
        return bytes(found[0])

    @property
    def size(self) -> int:
        return len(self._whole())

    def some(self, start: int, end: int) -> bytes:
        return bytes(self._whole()[start:end])

    def fetch(self, start: int, end: int) -> bytes:
        return self.some(start, end)

    def _whole(self) -> memoryview:
        from .dicom_file import quietly

        with self._fetching:
            if self._data is None:
                found = asked(self.url, self.service, lambda client: client.retrieve_instance(*self._uids))
                file = io.BytesIO()
                try:
                    with quietly():
                        found.save_as(file, enforce_file_format=True)
                except Exception as error:  # pydicom has many
                    raise DataError(f"{self.url}: is damaged in its store ({one_line(error)})") from error
                self._data = file.getbuffer()
            return self._data


def store(service: str, documents: Sequence[Dataset]) -> None:
    """Store instances in a store.

    Args:
        service: see `service_of`.

    Raises:
        StoreUnreachableError: if the store cannot be reached. DataError: if it refuses one.
    """
    found = asked(service, service, lambda client: client.store_instances(documents))
    failed = list(found.get("FailedSOPSequence") or ())
    if failed:
        reason = int(failed[0].get("FailureReason") or 0)
        raise DataError(f"{service}: has not stored {len(failed)} of {len(documents)} instances (reason {reason:04X}H)")


def service_of(url: str) -> str:
    """The URL of a store that results go to.

    Raises:
        DataError: if it is none, cannot be reached, or the libraries are missing.
    """
    place = place_of(url)
    if place.study or place.series or place.instance or place.filters:
        raise DataError(
            f"{url}: results go to a store, each into its image's study; name dicomweb+https://host/dicom-web"
        )
    try:
        import highdicom  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise DataError("results are made by highdicom: pip install 'gigamorph[dicomweb]'") from error
    asked(url, place.service, lambda client: client.search_for_studies(limit=1))
    return place.service


def asked(url: str, service: str, call: Callable[[Any], T]) -> T:
    """What a store answers, at the third try at the latest.

    Args:
        url: for messages.
        call: takes the client.

    Raises:
        StoreUnreachableError: if the store cannot be reached, is out of order or wants to know who asks.
        DataError: if it refuses this, and why.
    """
    client = _client(service)
    import requests

    for left in reversed(range(_TRIES)):
        try:
            return call(client)
        except requests.HTTPError as error:
            status, reason = _status(error), getattr(error.response, "reason", "") or ""
            said = f"{url}: its store answers {status} {brief(reason)}".rstrip()
            if status in (401, 403):
                raise StoreUnreachableError(f"{said}; put user and password for it into ~/.netrc") from error
            if status < 500 and status not in (408, 429):
                raise DataError(said) from error
            final = StoreUnreachableError(said) if status in (408, 429, 502, 503, 504) else DataError(said)
        except requests.RequestException as error:
            final = StoreUnreachableError(f"{url}: its store cannot be reached ({_cause(error)})")
            if isinstance(error, requests.exceptions.InvalidURL):
                raise final from error
        except DataError:
            raise
        except Exception as error:  # of the answer, which pydicom and json read
            raise DataError(f"{url}: its store's answer cannot be read ({one_line(error)})") from error
        if not left:
            raise final
        time.sleep(0.2 * 4 ** (_TRIES - 1 - left))
    raise AssertionError


def _status(error: Any) -> int:
    return getattr(error.response, "status_code", None) or 500


def _cause(error: BaseException) -> str:
    """What lies below an error of requests, which tells of its own objects."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or one_line(error)  # pyright: ignore[reportArgumentType]


def _client(service: str) -> Any:
    """The client of a store that this thread of this process has."""
    held = getattr(_local, "clients", None)
    if held is None or held[0] != os.getpid():  # connections do not go over to forked processes
        held = _local.clients = os.getpid(), {}
    if service not in held[1]:
        held[1][service] = connect(service)
    return held[1][service]


def connect(service: str) -> Any:
    """A client of dicomweb-client for a store.

    Raises:
        DataError: if that is missing, or the URL is none.
    """
    try:
        from dicomweb_client import DICOMwebClient
    except ImportError as error:
        raise DataError("DICOMweb needs dicomweb-client: pip install 'gigamorph[dicomweb]'") from error
    from requests import Session

    class Plain(Session):
        """Wildcards and commas of searches as they are: a store need not decode them, and Orthanc does not.

        It logs in only where .netrc names the host: a table names hosts too, and "default" means each of them.
        """

        def prepare_request(self, request: Any) -> Any:
            request.auth = _login(request.url) or _no_login
            return super().prepare_request(request)

        def rebuild_auth(self, prepared_request: Any, response: Any) -> None:  # of a redirect, maybe to another host
            prepared_request.headers.pop("Authorization", None)
            prepared_request.prepare_auth(_login(prepared_request.url) or _no_login)

        def request(self, method: Any, url: Any, *args: Any, **options: Any) -> Any:
            place, mark, query = str(url).partition("?")
            for code, sign in (("%2A", "*"), ("%3F", "?"), ("%2C", ",")):
                query = query.replace(code, sign)
            return super().request(method, place + mark + query, *args, **options)

    try:
        client = DICOMwebClient(service, session=Plain(), timeout=_PATIENCE)
    except ValueError as error:
        raise DataError(f"{service}: is no URL of a DICOMweb store ({one_line(error)})") from error
    client.set_http_retry_params(retry=False)
    return client


def _login(url: str) -> tuple[str, str] | None:
    """User and password of .netrc for the host of a URL; those of its "default" are for no host in particular."""
    from requests.utils import get_netrc_auth

    host = urlsplit(url).hostname
    paths = map(os.path.expanduser, [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"])
    try:
        path = next(filter(os.path.exists, paths), None)
        return get_netrc_auth(url) if path is not None and host in netrc.netrc(path).hosts else None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None


def _no_login(prepared: Any) -> Any:
    """Stands where requests would look for a login itself."""
    return prepared
