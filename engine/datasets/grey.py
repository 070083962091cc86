"""Checks of the grey scale: 12 bits in 16-bit files, floats from 0 to 255, a mean in grey levels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from ..images.levels import DARK, WHITES, sample_rows
from ..images.pixels import ImageSource
from .dataset import ImageDataset
from .tables import Record
from .tables.folders import suffix_of

_SAMPLED = 4
# Rounding and resampling kernels that overshoot make floats slightly brighter than white.
_BRIGHT = 1.5
_UNLIKE = 2.0
_SATURATED = 0.9


class GreyRange(NamedTuple):
    """The grey values in some rows of an image.

    Attributes:
        least, most: the smallest and the largest grey value.
        bright: the grey value that a thousandth of the pixels exceeds, which ignores single bright pixels.
        white: the share of white pixels.
    """

    source: ImageSource
    least: float
    most: float
    bright: float
    white: float


def odd_range(source: ImageSource, most: float, bright: float | None = None, white: float = 0.0) -> str:
    """The problem of an image with the largest grey value `most`, and the remedy; empty without a problem.

    Colour images are not checked, and DICOM files only if `bright` is known.

    Args:
        bright, white: as in `GreyRange`.
    """
    described = source.stored.self_describing
    if source.stored.shape[0] != 1 or (described and bright is None):
        return ""
    bright = most if bright is None else bright
    value = float(f"{most * source.full:.5g}")  # the stored value, without later rounding
    remedy = next((f"{level:g}" for level in WHITES if level >= value), f"{value:g}")
    remedy = f"set the white level: --white {remedy}, or a column white"
    if described:
        remedy = "choose another grey scale (--voi), or inspect it: gigamorph data preview"
    elif most > _BRIGHT:
        return f"grey values reach {value:g}, but white is {source.full:g}; {remedy}"
    if white > _SATURATED:
        return f"{white:.0%} of the pixels are white; {remedy}"
    if 0 < bright <= DARK:
        shown = most if most <= DARK else bright
        reach = f"{shown * source.full:.5g} of {source.full:g}"
        return f"grey values reach only {reach}, nearly black; {remedy}"
    return ""


def grey_warnings(images: ImageDataset) -> list[str]:
    """Warnings about the grey scale of a sample of images, and about a mean and std that do not fit it.

    Reads some rows of up to four images of each file type, spread over the table. Damaged images and images with NaN
    are skipped, because their later use reports them.
    """
    found = []
    by_kind = {kind: _sample(images, numbers) for kind, numbers in _kinds(images.records).items()}
    ranges = [one for some in by_kind.values() for one in some]
    odd = [(one, text) for one in ranges if (text := odd_range(one.source, *one[2:]))]
    if odd:
        more = f" (and {len(odd) - 1} more of {len(ranges)} checked images)" if len(odd) > 1 else ""
        found.append(f"{odd[0][0].source.name}{more}: {odd[0][1]}")
    found += _unlike(by_kind)
    if ranges and images.normalize is not None:
        least, most = min(one.least for one in ranges), max(one.most for one in ranges)
        found += _misfits(images.normalize.mean, images.normalize.std, least, most)
    return found


def unlike_kinds(images: ImageDataset) -> list[str]:
    """Warnings if file types reach different grey values, by a sample of each; empty for a single type."""
    kinds = _kinds(images.records)
    return _unlike({kind: _sample(images, numbers) for kind, numbers in kinds.items()}) if len(kinds) > 1 else []


def _kinds(records: Sequence[Record]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        found[kind_of_file(record.path)].append(number)
    return found


def _sample(images: ImageDataset, numbers: Sequence[int]) -> list[GreyRange]:
    """The grey ranges of a few of these images; unusable images are left out."""
    chosen = sorted({round(index) for index in np.linspace(0, len(numbers) - 1, _SAMPLED)})
    return [found for index in chosen if (found := _range(images, numbers[index]))]


def _unlike(by_kind: Mapping[str, Sequence[GreyRange]]) -> list[str]:
    """A warning if file types use different shares of their scale from black to white."""
    reach = {kind: float(np.median([one.most for one in some])) for kind, some in by_kind.items() if some}
    if len(reach) < 2 or max(reach.values()) <= _UNLIKE * min(reach.values()):
        return []
    listed = ", ".join(f"{value:.2g} in {kind}" for kind, value in reach.items())
    return [
        f"file types reach different grey values ({listed}; 0 black to 1 white), so a network can recognise the type: "
        "bring them to one scale (--voi, --white, gigamorph data convert)"
    ]


def _range(images: ImageDataset, number: int) -> GreyRange | None:
    """The sampled grey values of an image before normalisation; None if it cannot be read."""
    try:
        return _sampled(images.opened(images.records[number], None))
    except DataError:
        return None


def odd_grey(source: ImageSource) -> str:
    """`odd_range` of an image, from a sample of its rows; the normalisation does not matter."""
    seen = _sampled(ImageSource(source.stored, flip=False, channels=source.shape[0], white=source.full))
    return "" if seen is None else odd_range(seen.source, *seen[2:])


def _sampled(source: ImageSource) -> GreyRange | None:
    """The sampled grey values of an image without normalisation; None if they are not finite."""
    height, width = source.shape[-2:]
    strips = [source.read(top, bottom, 0, width) for top, bottom in sample_rows(height, math.prod(source.shape[1:-2]))]
    values = np.concatenate([strip.flatten().numpy() for strip in strips])
    least, most = float(values.min()), float(values.max())
    if not np.isfinite([least, most]).all():
        return None  # the network refuses it and names it
    bright = float(np.partition(values, last := int(0.999 * (len(values) - 1)))[last])
    return GreyRange(source, least, most, bright, float((values >= 1).mean()))


def _misfits(mean: Sequence[float], std: Sequence[float], least: float, most: float) -> Iterator[str]:
    scale = f"grey values of the images are {least:.3g} to {most:.3g} (0 black, 1 white)"
    for value in mean:
        if value != 0 and not least <= value <= most:
            yield f"mean {value:g} is outside the grey range; {scale}: divide it by the value of white"
            break
    for value in std:
        if value != 1 and value > max(most - least, 1e-6):
            yield f"std {value:g} exceeds the grey range; {scale}: divide it by the value of white"
            break


def kind_of_file(path: Path) -> str:
    """The type of a file by its name: DICOM, PNG, ..."""
    suffix = suffix_of(path).removeprefix(".")
    names = dict.fromkeys(("dcm", "dicom", "dic", "dc3", "ima", ""), "DICOM") | {"jpeg": "JPG", "tif": "TIFF"}
    return names.get(suffix, suffix.upper())


def label_by_kind_warning(labelled: Iterable[tuple[Path, str]]) -> str:
    """A warning if the file type determines the label, because a network may then learn the file type.

    Empty if there is one type, if a type has images of several labels, or if all images have the same label.

    Args:
        labelled: the files that have a label, with the label.
    """
    labels_of: dict[str, set[str]] = defaultdict(set)
    for path, label in labelled:
        labels_of[kind_of_file(path)].add(label)
    if len(set().union(*labels_of.values())) < 2 or any(len(labels) > 1 for labels in labels_of.values()):
        return ""
    pairs = ", ".join(f"{kind} have label {min(labels)}" for kind, labels in labels_of.items())
    return f"the file type determines the label (all {pairs}): the network may learn the type"
