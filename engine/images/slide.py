"""Whole-slide DICOM: an image whose tiles are the frames of a file (PS3.3 C.8.12.4, C.7.6.17), read by region."""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID

from ..errors import DataError
from . import grayscale
from .dicom_file import StoredFrames
from .header import DicomInfo
from .stored import chosen_plane
from .tiles import TiledPixels, TileGrid

_RGB = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
# A sparse slide with less than this part of its matrix has a damaged header.
_SPARSEST = 1e-4
_PLANES = "focal planes and optical paths"


class SlidePixels(TiledPixels):
    """Stored pixels (`stored.StoredPixels`) of a slide; created by `dicom.open_dicom`.

    Missing tiles of a sparse slide are white in colour images and black in grey images.

    Args:
        ds, info: the header and its data.
        frames: the frames of the file.
        voi: the grey scale, as in `open_pixels`.
        plane: the index of focal plane and optical path, focal planes first; required if there are several.
    """

    self_describing = True

    def __init__(self, ds: Dataset, info: DicomInfo, frames: StoredFrames, *, voi: str, plane: int | None) -> None:
        self.path, self.name = frames.path, str(frames.path)
        self.info, self._frames = info, frames
        assert info.matrix is not None
        samples, photometric = frames.frame.samples, info.photometric
        grey = photometric in ("MONOCHROME1", "MONOCHROME2") and samples == 1
        # Codecs return RGB; uncompressed pixels must be RGB already.
        colour = samples == 3 and (photometric == "RGB" or (photometric in _RGB and frames.compressed))
        if not (grey or colour):
            raise DataError(f"{self.path}: {photometric} with {samples} samples is not supported; convert it to RGB")
        self.shape = (samples, *info.matrix)
        self.dtype = frames.dtype
        self.tile_size = (info.rows, info.columns)
        self._index, self.plane, planes = _tile_frames(ds, info, plane, self.name)
        self.full = 2**frames.bits - 1
        self._absent = self.full
        scale: tuple[str, ...] = ()
        if grey:
            if voi == "minmax":
                raise DataError(f"{self.path}: cannot use voi='minmax', which reads the whole slide; choose another")
            for_display = not info.for_processing
            built = grayscale.build(
                ds, voi=voi, frame=min(self._frames_used()), for_display=for_display, name=self.name
            )
            self.table, self.full, scale = built.table, built.full, built.steps
            self._absent = int(np.argmin(built.table))
        which = f", plane {self.plane} of {planes}" if planes > 1 else ""
        self.steps = (f"DICOM slide, {UID(frames.syntax).name}, {frames.bits} bits{which}", *scale)
        self._grid = TileGrid(self.tile_size)

    def tile(self, row: int, column: int) -> np.ndarray:
        """The pixels (samples, rows, columns) of a frame, as unsigned bit patterns."""
        across = -(-self.shape[2] // self.tile_size[1])
        index = self._index + row * across + column if isinstance(self._index, int) else self._index.get((row, column))
        if index is None:
            return np.full((self.shape[0], *self.tile_size), self._absent, self.dtype)
        pixels = self._frames.decode(index)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _frames_used(self) -> list[int]:
        return [self._index] if isinstance(self._index, int) else list(self._index.values())


def _tile_frames(
    ds: Dataset, info: DicomInfo, plane: int | None, name: str
) -> tuple[int | dict[tuple[int, int], int], int, int]:
    """The frame of the first tile, or of each tile by (row, column); the plane; the number of planes."""
    assert info.matrix is not None
    down, across = (-(-side // tile) for side, tile in zip(info.matrix, (info.rows, info.columns), strict=True))
    groups = list(ds.get("PerFrameFunctionalGroupsSequence") or [])
    full = str(ds.get("DimensionOrganizationType") or "") == "TILED_FULL"
    if full or len(groups) != info.frames or not groups[0].get("PlanePositionSlideSequence"):
        count, rest = divmod(info.frames, down * across)
        if rest or not count:
            raise DataError(f"{name}: {info.frames} frames do not fill {down} x {across} tiles; fetch the whole slide")
        chosen = chosen_plane(plane, count, name, _PLANES, "plane")
        return chosen * down * across, chosen, count
    if info.frames * info.rows * info.columns < _SPARSEST * info.matrix[0] * info.matrix[1]:
        raise DataError(f"{name}: {info.frames} frames are too few for {down} x {across} tiles; the header is damaged")
    planes: dict[tuple[str, float], dict[tuple[int, int], int]] = {}
    for number, group in enumerate(groups):
        position = group.PlanePositionSlideSequence[0]
        row, column = (
            int(position.RowPositionInTotalImagePixelMatrix) - 1,
            int(position.ColumnPositionInTotalImagePixelMatrix) - 1,
        )
        if row % info.rows or column % info.columns or not (0 <= row < info.matrix[0] and 0 <= column < info.matrix[1]):
            raise DataError(f"{name}: frame {number} at {row}, {column} is not on the grid of tiles; convert it")
        path = (group.get("OpticalPathIdentificationSequence") or [Dataset()])[0].get("OpticalPathIdentifier")
        depth = float(position.get("ZOffsetInSlideCoordinateSystem") or 0)
        planes.setdefault((str(path or ""), depth), {})[row // info.rows, column // info.columns] = number
    chosen = chosen_plane(plane, len(planes), name, _PLANES, "plane")
    return planes[sorted(planes)[chosen]], chosen, len(planes)
