"""Writes a map as DICOM SEG of the explained image."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydicom.sr.codedict import codes

from ..errors import DataError
from ..files import write_atomically
from ..images.dicom_results import segment, segmentation, source_header
from ..train.explanation import Explanation

Kind = Literal["fractional", "binary"]
REGION = 0.5
"""Fraction of the map's maximum from which a pixel belongs to the region of a binary SEG."""
_STRIP = 512


def write_segmentation(found: Explanation, image: str | Path, path: str | Path, *, label: str, kind: Kind) -> None:
    """Write the relative map (`Explanation.relative`) of a DICOM image as a SEG of its size, with one segment.

    Args:
        found: the map.
        image: the explained DICOM file, of a single frame, or its URL in a DICOMweb store.
        path: of the SEG.
        label: of the segment.
        kind: "fractional" maps 1 to 255 (which is not a probability of a lesion); "binary" has the region of at least
            half of the maximum, which every viewer can show, and is empty if the class is less probable than not.

    Raises:
        DataError: if highdicom is missing, the image is not a DICOM file of one frame, or its header lacks an attribute
            that a SEG must repeat.
    """
    try:
        import highdicom  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise DataError("DICOM SEG needs highdicom: pip install highdicom") from error
    header = source_header(image, "so it cannot have a DICOM SEG; write png or tif")
    frames = int(header.get("NumberOfFrames") or 1)
    if frames != 1 or (header.Rows, header.Columns) != found.size:
        raise DataError(f"{image}: has {frames} frames; a DICOM SEG needs one; write png or tif")
    shown = found.relative()
    heat = _pixel_map(shown)
    pixels = heat if kind == "fractional" else _region(heat, shown)
    described = segment(1, label, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion)
    try:
        seg = segmentation(image, header, pixels, [described], content="Relative evidence of a network")
    except DataError as error:
        raise DataError(f"{error}; write png or tif") from error
    write_atomically(path, lambda p: seg.save_as(p), "DICOM SEG")


def _region(heat: np.ndarray, shown: Explanation) -> np.ndarray:
    called = shown.log_odds is None or shown.log_odds >= 0
    return (heat >= REGION * float(shown.values.max())) & (heat > 0) & called


def _pixel_map(found: Explanation) -> np.ndarray:
    height, width = found.size
    heat = np.empty((height, width), np.float32)
    for top in range(0, height, _STRIP):
        bottom = min(top + _STRIP, height)
        heat[top:bottom] = found.read(top, bottom, 0, width)
    return heat.clip(0, 1, out=heat)
