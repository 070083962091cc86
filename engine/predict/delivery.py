"""Sends results to a DICOMweb store after a run, each exactly once, even if the run is interrupted and resumed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from ..errors import DataError, GigamorphError
from ..images.dicomweb import StoreUnreachableError, service_of, store
from .index import RunDatabase
from .parts import Parts, read_parts

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_STORED = pa.schema([(name, pa.string()) for name in ("key", "name", "instance")])


@dataclass(frozen=True)
class Document:
    """A DICOM instance that is made from results.

    Attributes:
        key: of the results; an instance is not stored again for the same results.
        name: of the image or study, for messages.
        make: makes the instance, given its UID.
    """

    key: str
    name: str
    make: Callable[[str], Dataset]


def deliver(documents: Iterable[Document], index: RunDatabase, url: str, folder: Path) -> int:
    """Store documents that this folder has not sent to the store yet; returns their number.

    An instance's UID is derived from its results, so if the run is killed just after a transfer, the repeated transfer
    replaces the instance by itself. A document that fails does not stop the others.

    Args:
        documents: the documents.
        index: holds the keys of stored documents.
        url: of the store.
        folder: of the records of stored documents.

    Raises:
        GigamorphError: if the store cannot be reached, or has refused a document; stored documents remain recorded.
    """
    from pydicom.uid import generate_uid

    service = service_of(url)
    for rows in read_parts(folder):
        index.add_stored(row["key"] for row in rows)
    notes = Parts(folder / "1-of-1", _STORED)
    done = failed = 0
    last: DataError | None = None
    try:
        for document in documents:
            key = hashlib.sha256(f"{service}\0{document.key}".encode()).hexdigest()[:32]
            if index.is_stored(key):
                continue
            uid = str(generate_uid(entropy_srcs=[key]))
            try:
                made = document.make(uid)
                store(service, [made])
            except StoreUnreachableError:
                raise
            except DataError as error:
                failed, last = failed + 1, error
                continue
            notes.append({"key": key, "name": document.name, "instance": str(made.SOPInstanceUID)})
            notes.sync(now=False)
            done += 1
    finally:
        with contextlib.suppress(GigamorphError):  # another error would hide the first
            notes.close()
    notes.pack()
    if last is not None:
        raise GigamorphError(
            f"{failed} of {done + failed} results were not stored in {url}, the others were; --resume retries them; "
            f"last error: {last}"
        )
    return done
