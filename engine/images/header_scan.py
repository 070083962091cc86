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
    """`dicom.read_info` of each file, in the order of `paths`; the error for a file that cannot be read.

    Args:
        paths: the files.
        workers: the number of processes, as in `run_parallel`.
        on_done: called after each file.
    """
    found: list[DicomInfo | DataError] = [DataError("not read")] * len(paths)
    for index, result in run_parallel(read_info, paths, workers=workers, chunk=64):
        found[index] = result
        if on_done is not None:
            on_done()
    return found
