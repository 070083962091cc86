"""The headers of many DICOM files, in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import DataError
from .dicom import DicomInfo, read_info
from .parallel import run_parallel


def read_headers(
    paths: Sequence[Path], *, workers: int | None = None, on_done: Callable[[], object] | None = None
) -> list[DicomInfo | DataError]:
    """`dicom.read_info` of every file, in the order of `paths`; what cannot be read is its error.

    on_done: called once for every file that is done.
    """
    found: list[DicomInfo | DataError] = [DataError("not read")] * len(paths)
    for index, result in run_parallel(read_info, paths, workers=workers, chunk=64):
        found[index] = result
        if on_done is not None:
            on_done()
    return found
