"""The DICOM grey-scale pipeline as an integer table from stored values to grey levels (PS3.3 C.11, PS3.4 N.2).

Stored value -> sign -> modality LUT -> one VOI transformation -> inversion of MONOCHROME1; padding becomes black.
A table has an entry for each of the 2^BitsStored stored values, so the pipeline is exact and costs one gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from ..errors import DataError
from ..parsing import is_whole
from .rawfile import brief


@dataclass(frozen=True)
class GreyScale:
    """The grey level of each stored value, and the applied steps."""

    table: np.ndarray
    """uint16 (2^BitsStored,), indexed by the BitsStored bits of a pixel: negative values are in the upper half."""
    full: int
    """The level of white."""
    steps: tuple[str, ...]
    """The applied steps, in order, without text from the file."""


def build(
    ds: Dataset, *, voi: str, frame: int, for_display: bool, name: str, present: np.ndarray | None = None
) -> GreyScale:
    """The grey scale of a frame.

    Args:
        ds: the header.
        voi: "auto" (first VOI LUT, else first window, else full range), "none" (full range), "minmax" (from the darkest
            to the brightest pixel), "window:I" or "lut:I" with I a number from 0 or the name in the file.
        frame: the index of the frame.
        for_display: whether the image is for presentation.
        name: the file, for messages.
        present: the bit patterns in the frame, bool (2^BitsStored,); for "minmax" only.

    Raises:
        DataError: if the header contradicts itself, or gives all stored values the same grey.
    """
    bits = int(ds.BitsStored)
    stored = _stored(ds, bits)
    padding = _padding(ds, stored)
    values, modality = _modality(ds, stored, frame, name)
    if not np.all(np.isfinite(values)):
        raise DataError(f"{name}: the rescaled values are not finite; correct the header")
    if not for_display and voi == "auto":  # these images must not have a VOI module, so it is ignored
        voi = "none"
    inside = values[present & ~padding] if present is not None else values
    grey, full, step = _voi(ds, values, inside, voi, frame, bits, name)
    steps = [*modality, step]
    if ds.PhotometricInterpretation == "MONOCHROME1":
        grey = full - grey
        steps.append("inverted, as MONOCHROME1 says")
    shown = grey[~padding]
    if present is None and (not shown.size or shown.min() == shown.max()):
        raise DataError(f"{name}: the header gives all stored values the same grey ({step}); choose another voi")
    grey = np.where(padding, 0, grey)
    if padding.any():
        first, last = stored[padding].min(), stored[padding].max()
        steps.append(f"padding {first} to {last} black")
    return GreyScale(grey.astype(np.uint16), full, tuple(steps))


def _stored(ds: Dataset, bits: int) -> np.ndarray:
    """The stored value of each bit pattern, int64 (2^bits,)."""
    stored = np.arange(2**bits, dtype=np.int64)
    if ds.get("PixelRepresentation", 0):
        stored = np.where(stored >= 2 ** (bits - 1), stored - 2**bits, stored)
    return stored


def padding_patterns(ds: Dataset) -> np.ndarray | None:
    """The bit patterns of background, bool (2^BitsStored,); None if the file declares no padding."""
    if ds.get("PixelPaddingValue") is None:
        return None
    return _padding(ds, _stored(ds, int(ds.BitsStored)))


def _padding(ds: Dataset, stored: np.ndarray) -> np.ndarray:
    first = ds.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, bool)
    last = ds.get("PixelPaddingRangeLimit")
    limits = [int(first), int(first if last is None else last)]
    if ds.get("PixelRepresentation", 0):  # sometimes written with an unsigned VR
        limits = [value - 2**16 if value >= 2**15 else value for value in limits]
    else:
        limits = [value + 2**16 if value < 0 else value for value in limits]
    return (stored >= min(limits)) & (stored <= max(limits))


def functional_group(ds: Dataset, sequence: str, frame: int) -> Dataset:
    """The item of a functional group for a frame: its own, otherwise the shared one, otherwise the top level."""
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    groups = [per_frame[frame]] if frame < len(per_frame) else []
    groups += list(ds.get("SharedFunctionalGroupsSequence") or [])
    for group in groups:
        if group.get(sequence):
            return group[sequence].value[0]
    return ds


def _modality(ds: Dataset, stored: np.ndarray, frame: int, name: str) -> tuple[np.ndarray, list[str]]:
    group = functional_group(ds, "PixelValueTransformationSequence", frame)
    if ds.get("ModalityLUTSequence"):
        data, first, _ = _lut(ds, ds.ModalityLUTSequence[0], bool(ds.get("PixelRepresentation", 0)), name)
        return data[np.clip(stored - first, 0, len(data) - 1)], [f"modality LUT of {len(data)} entries from {first}"]
    slope, intercept = _number(group.get("RescaleSlope"), 1.0), _number(group.get("RescaleIntercept"), 0.0)
    if slope == 0:
        raise DataError(f"{name}: RescaleSlope is 0, which makes all pixels equal; correct the header")
    if (slope, intercept) == (1.0, 0.0):
        return stored, []
    return stored * slope + intercept, [f"rescaled by {slope:g}, {intercept:+g}"]


def _voi(
    ds: Dataset, values: np.ndarray, inside: np.ndarray, voi: str, frame: int, bits: int, name: str
) -> tuple[np.ndarray, int, str]:  # grey levels, level of white, step
    group = functional_group(ds, "FrameVOILUTSequence", frame)
    luts = list(group.get("VOILUTSequence") or [])
    centers, widths = _numbers(group.get("WindowCenter")), _numbers(group.get("WindowWidth"))
    windows = list(zip(centers, widths, strict=False))
    names = {
        "lut": [str(lut.get("LUTExplanation") or "") for lut in luts],
        "window": (_texts(group.get("WindowCenterWidthExplanation")) + [""] * len(windows))[: len(windows)],
    }
    kind, index = _choice(voi, names, name)
    full = 2**bits - 1
    if kind == "lut":
        signed = bool(values.min() < 0)
        data, first, full = _lut(ds, luts[index], signed, name)
        grey = data[np.clip(np.rint(values).astype(np.int64) - first, 0, len(data) - 1)]
        return grey, full, f"VOI lut:{index}, {len(data)} entries from {first}"
    # The functions below are continuous, and a narrow window on few levels would show steps. So the number of levels is
    # the largest in 16 bits that is a multiple of the stored levels, which keeps the full range exact.
    fine = full * ((2**16 - 1) // full)
    if kind == "window":
        function = str(group.get("VOILUTFunction") or "LINEAR").upper()
        center, width = windows[index]
        fraction = _window(values, center, width, function, name)
        return np.rint(fraction * fine).astype(np.int64), fine, f"VOI window:{index}, {function} {center:g}/{width:g}"
    low, high = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 0.0)
    full, step = (fine, f"VOI minmax, {low:g} to {high:g}") if kind == "minmax" else (full, "VOI none, full range")
    scale = 1 / (high - low) if high > low else 0.0
    return np.rint(np.clip((values - low) * scale, 0, 1) * full).astype(np.int64), full, step


def _choice(voi: str, names: dict[str, list[str]], name: str) -> tuple[str, int]:
    """The kind of transformation, and the index of a LUT or window."""
    if voi == "auto":
        return ("lut", 0) if names["lut"] else ("window", 0) if names["window"] else ("none", 0)
    if voi in ("none", "minmax"):
        return voi, 0
    kind, _, which = voi.partition(":")
    check_voi(voi)
    if is_whole(which) and int(which) < len(names[kind]):
        return kind, int(which)
    spelt = [each.casefold() for each in names[kind]]
    if which.casefold() in spelt:
        return kind, spelt.index(which.casefold())
    count = len(names[kind])
    raise DataError(f"{name}: voi={voi!r} does not exist; the file has {count} of these; use voi='auto'")


def check_voi(voi: str) -> None:
    """Raise a `DataError` unless `voi` has a form that `build` accepts."""
    kind, _, which = voi.partition(":")
    if voi not in ("auto", "none", "minmax") and (kind not in ("lut", "window") or not which.strip()):
        raise DataError(f"voi={voi!r} must be 'auto', 'none', 'minmax', 'window:I' or 'lut:I'")


def _window(values: np.ndarray, center: float, width: float, function: str, name: str) -> np.ndarray:
    """Grey as a fraction of the output range (PS3.3 C.11.2.1.2 and .3)."""
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DataError(
            f"{name}: unknown VOILUTFunction {brief(function)!r}; choose another grey scale with voi='none'"
        )
    if not (np.isfinite(center) and np.isfinite(width)) or (width < 1 if function == "LINEAR" else width <= 0):
        raise DataError(
            f"{name}: WindowCenter {center:g}, WindowWidth {width:g} is not allowed; choose another with voi='none'"
        )
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return np.where(values <= center, 0.0, 1.0)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _lut(ds: Dataset, item: Dataset, signed: bool, name: str) -> tuple[np.ndarray, int, int]:
    """Entries, first mapped value and full output level of a modality or VOI LUT."""
    descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
    if descriptor is None or len(descriptor) != 3 or data is None:
        raise DataError(f"{name}: has a LUT without descriptor or data; choose another grey scale with voi='none'")
    count, first, bits = (int(value) for value in descriptor)
    count = count % 2**16 or 2**16  # 0 means 65536
    if signed and first >= 2**15:
        first -= 2**16
    elif not signed and first < 0:
        first += 2**16
    entries = _entries(ds, data, count)
    if len(entries) != count:
        raise DataError(f"{name}: a LUT has {len(entries)} entries instead of {count}; use voi='none' or another LUT")
    # Some files declare fewer bits than their entries have.
    return entries, first, 2 ** max(bits, int(entries.max()).bit_length()) - 1


def _entries(ds: Dataset, data: Any, count: int) -> np.ndarray:
    """LUTData as int64: words (US, or OW as bytes) or, for half as many words, bytes packed into words."""
    order = "<" if getattr(ds, "original_encoding", (None, True))[1] else ">"
    if not isinstance(data, bytes | bytearray):
        words = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
        if len(words) == count or len(words) != (count + 1) // 2:
            return words
        data = words.astype("<u2").tobytes()
    elif len(data) >= 2 * count:
        return np.frombuffer(data, f"{order}u2", count).astype(np.int64)
    return np.frombuffer(data, np.uint8)[:count].astype(np.int64)


def _number(value: Any, default: float) -> float:
    return default if value is None or value == "" else float(value)


def _numbers(value: Any) -> list[float]:
    if value is None or value == "":
        return []
    return [float(v) for v in value] if hasattr(value, "__iter__") and not isinstance(value, str) else [float(value)]


def _texts(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [str(v) for v in value]
