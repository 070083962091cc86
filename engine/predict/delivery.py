"""Results that go to a DICOMweb store when a run is done: each once, however often the run is stopped and goes on."""

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
from .index import Index
from .parts import Parts, read_parts

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_STORED = pa.schema([(name, pa.string()) for name in ("key", "name", "instance")])


@dataclass(frozen=True)
class Document:
    """An instance that is made of results.

    Attributes:
        key: of what it is made of; the same results make no second one.
        name: of image or study, for messages.
        make: the instance; takes a UID for it.
    """

    key: str
    name: str
    make: Callable[[str], Dataset]


def deliver(documents: Iterable[Document], index: Index, url: str, folder: Path) -> int:
    """Store documents that the store has not got from this folder yet; returns how many.

    An instance's UID follows from what it is made of, so that one that was stored just before a kill is replaced by
    itself. One that cannot be made or that the store refuses does not keep the others back.

    Args:
        index: keeps what is stored.
        folder: the notes of what is stored.

    Raises:
        GigamorphError: the store cannot be reached, or has not taken all; what it has stays noted.
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
        with contextlib.suppress(GigamorphError):  # a further error hides the first
            notes.close()
    notes.pack()
    if last is not None:
        raise GigamorphError(
            f"{failed} of {done + failed} results were not stored in {url}, the others were; --resume tries them "
            f"again; the last: {last}"
        )
    return done
