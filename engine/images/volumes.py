"""Volumes: the slices of an exam as one source, in the order of their positions in the patient.

All slices of a region are read together. Formats without random access are decoded once, in threads, into a temporary
file, so that a volume takes little memory.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from ..errors import DataError
from .grayscale import functional_group
from .parallel import available_cpus
from .rawfile import RawPixels, reading
from .stored import StoredPixels

_PARALLEL = 1e-3
"""The maximum difference of direction cosines of parallel slices."""
_GAP = 1.5
"""A distance of neighbouring slices above this multiple of the median is a missing slice."""


@dataclass(frozen=True)
class SlicePlace:
    """Where a DICOM frame lies in the patient (PS3.3 C.7.6.2, C.7.6.16.2.3).

    Attributes:
        position: of the first pixel's centre, in mm: x, y, z.
        directions: direction cosines of a row and of a column.
        spacing: mm between slices by the header, or None.
        series: the SeriesInstanceUID.
    """

    position: tuple[float, ...] = ()
    directions: tuple[float, ...] = ()
    spacing: float | None = None
    series: str = ""

    @classmethod
    def of(cls, ds: Dataset, frame: int) -> SlicePlace:
        """The place of a frame by its header; without damaged or missing elements."""
        position = functional_group(ds, "PlanePositionSequence", frame).get("ImagePositionPatient")
        directions = functional_group(ds, "PlaneOrientationSequence", frame).get("ImageOrientationPatient")
        measures = functional_group(ds, "PixelMeasuresSequence", frame)
        between = _numbers([measures.get("SpacingBetweenSlices")], 1)
        series = str(ds.get("SeriesInstanceUID") or "")
        return cls(_numbers(position, 3), _numbers(directions, 6), next(iter(between), None), series)

    @property
    def known(self) -> bool:
        """Whether the header has position and directions."""
        return bool(self.position and self.directions)

    @property
    def along(self) -> float:
        """The position along the normal of the slice, in mm."""
        return float(np.dot(np.cross(self.directions[:3], self.directions[3:]), self.position))


def _numbers(values: Any, count: int) -> tuple[float, ...]:
    """The numbers of an element; empty if it has others, or another count."""
    try:
        found = tuple(float(value) for value in values or ())
    except (TypeError, ValueError):
        return ()
    return found if len(found) == count and all(map(math.isfinite, found)) else ()


def in_order(places: Sequence[SlicePlace], name: str, of_one_file: bool) -> tuple[list[int], float | None]:
    """The order of slices along their normal, and the mm between them; slices that are in order already keep it.

    Args:
        places: of the slices.
        name: the volume, for messages.
        of_one_file: whether they are the frames of a file. Some tomosynthesis files give all frames one position; these
            are in the order of the file.

    Raises:
        DataError: if slices are of several series, are not parallel, coincide, or one is missing between others.
    """
    as_given = list(range(len(places)))
    if len({place.series for place in places}) > 1:
        raise DataError(f"{name}: has slices of {len({p.series for p in places})} series; pass the files of one series")
    if len(places) < 2 or not all(place.known for place in places):
        return as_given, places[0].spacing
    turned = max(np.abs(np.subtract(place.directions, places[0].directions)).max() for place in places)
    if turned > _PARALLEL:
        raise DataError(f"{name}: its slices are not parallel; pass the slices of one direction")
    along = [place.along for place in places]
    if of_one_file and len(set(along)) == 1:
        return as_given, None
    steps = np.diff(along)
    if not (np.all(steps > 0) or np.all(steps < 0)):
        as_given.sort(key=along.__getitem__)
        steps = np.diff([along[number] for number in as_given])
    steps = np.abs(steps)
    usual = float(np.median(steps))
    if steps.min() <= 0.01 * usual or usual == 0:
        raise DataError(f"{name}: two slices lie at {along[as_given[int(steps.argmin())]]:g} mm; remove one")
    if steps.max() > _GAP * usual:
        after = along[as_given[int(steps.argmax())]]
        raise DataError(
            f"{name}: {steps.max():g} mm between slices after {after:g} mm, but {usual:g} mm elsewhere; a slice is "
            "missing, fetch the whole series"
        )
    return as_given, usual


class VolumePixels(StoredPixels):
    """Slices of one size as stored pixels (channels, slices, height, width).

    Slices with unequal grey scales, such as windows of single frames, are read as fractions of the full range.

    Args:
        slices: the slices, in order.
        name: the volume, for messages.
        spacing: mm between slices, or None if it is unknown.
    """

    def __init__(self, slices: Sequence[StoredPixels], name: str, spacing: float | None = None) -> None:
        first = slices[0]
        for number, one in enumerate(slices):
            if (one.shape, one.dtype) != (first.shape, first.dtype):
                found, wanted = (f"{s.dtype} {tuple(s.shape)}" for s in (one, first))
                raise DataError(f"{one.name}: slice {number} is {found}, but slice 0 {wanted}; pass slices of one size")
        self.slices, self.name, self.spacing = tuple(slices), name, spacing
        self.shape = (first.shape[0], len(slices), *first.shape[1:])
        self.to_original, self.self_describing = first.to_original, first.self_describing
        self.info = getattr(first, "info", None)
        self._stored_dtype = np.dtype(first.dtype)
        self._alike = all(one.full == first.full and _same(one.table, first.table) for one in slices)
        self.dtype = self._stored_dtype if self._alike else np.dtype(np.float32)
        self.full = first.full if self._alike else 1.0
        self.table = first.table if self._alike else None
        apart = "" if spacing is None else f", {spacing:g} mm apart"
        self.steps = (f"{len(slices)} slices{apart}", *first.steps)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._decoded: RawPixels | None = None
        self._file: Any = None  # removed when it is closed

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_decoded", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        out = np.empty((*self.shape[:2], bottom - top, right - left), self._stored_dtype)
        if all(one.by_region for one in self.slices):
            for number, one in enumerate(self.slices):
                out[:, number] = one.read(top, bottom, left, right)
                one.close()  # a series may have more slices than a process may have open files
        else:
            with self._lock:
                if self._decoded is None:
                    self._decoded = self._decode()
            out = self._decoded.read(top, bottom, left, right)
        return out if self._alike else self._as_fractions(out)

    def _as_fractions(self, values: np.ndarray) -> np.ndarray:
        found = np.empty(values.shape, np.float32)
        for number, one in enumerate(self.slices):
            grey = values[:, number] if one.table is None else one.table[values[:, number]]
            found[:, number] = grey / one.full
        return found

    def _decode(self) -> RawPixels:
        """Decode the slices in threads into a temporary file."""
        count, (height, width) = len(self.slices), self.shape[-2:]
        each = math.prod(self.shape) // count * self._stored_dtype.itemsize
        self._file = file_for_slices(count * each, self.name)
        path = Path(self._file.name)

        def store(number: int) -> None:
            one = self.slices[number]
            pixels = np.ascontiguousarray(one.read(0, height, 0, width))
            one.close()
            with open(path, "r+b") as file:
                file.seek(number * each)
                file.write(pixels.reshape(-1).view(np.uint8).data)

        with reading(path):
            self._file.truncate(count * each)
            with ThreadPoolExecutor(min(8, available_cpus()), "gigamorph-slices") as pool:
                list(pool.map(store, range(count)))
        stored = (count, self.shape[0], height, width)
        return RawPixels(path, 0, stored, self._stored_dtype, order=(1, 0, 2, 3), full=1.0)

    def flips(self) -> tuple[bool, bool]:
        return self.slices[len(self.slices) // 2].flips()


def file_for_slices(count: int, name: str) -> Any:
    """A temporary file for `count` bytes of decoded slices; it is removed when it is closed.

    Raises:
        DataError: if the disk has too little space; `name` is the volume's.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if count > free:
        raise DataError(
            f"{name}: its slices take {count / 1e9:.1f} GB when decoded, but {folder} has {free / 1e9:.1f} GB free; "
            "set TMPDIR to a larger disk"
        )
    return tempfile.NamedTemporaryFile(prefix="gigamorph-slices-")


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
