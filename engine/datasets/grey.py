"""Images on another grey scale than they seem: 12 bits in 16-bit files, floats from 0 to 255, a mean in grey levels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from ..images.levels import DARK, WHITES, sample_rows
from ..images.pixels import ImageSource
from .dataset import ImageDataset
from .kinds import kind_of_file
from .tables import Record

_LOOKED_AT = 4
# Rounding, and resampling with kernels that overshoot, make floats a little brighter than white.
_BRIGHT = 1.5
_UNLIKE = 2.0
_SATURATED = 0.9


class Seen(NamedTuple):
    """What a look at some rows of an image has found.

    Attributes:
        least, most: of its grey values.
        bright: the grey value that a thousandth of them exceeds: single pixels make no image bright.
        white: share of them that are white.
    """

    source: ImageSource
    least: float
    most: float
    bright: float
    white: float


def odd_range(source: ImageSource, most: float, bright: float | None = None, white: float = 0.0) -> str:
    """What is odd about an image whose largest grey value is `most`, and the remedy; empty if nothing is.

    Colour is not judged. bright, white: as of `Seen`; where they are not known, DICOM files are not judged.
    """
    described = source.stored.self_describing
    if source.stored.shape[0] != 1 or (described and bright is None):
        return ""
    bright = most if bright is None else bright
    value = float(f"{most * source.full:.5g}")  # as it is stored, without the rounding of what was done since
    remedy = next((f"{level:g}" for level in WHITES if level >= value), f"{value:g}")
    remedy = f"say where white is: --white {remedy}, or a column white"
    if described:
        remedy = "choose another grey scale (--voi), or look at it: gigamorph data preview"
    elif most > _BRIGHT:
        return f"grey values reach {value:g}, and white is {source.full:g}; {remedy}"
    if white > _SATURATED:
        return f"{white:.0%} of the pixels are white; {remedy}"
    if 0 < bright <= DARK:
        shown = most if most <= DARK else bright
        reach = f"{shown * source.full:.5g} of {source.full:g}"
        return f"grey values reach only {reach}, nearly black; {remedy}"
    return ""


def grey_warnings(images: ImageDataset) -> list[str]:
    """What a look at a few of the images finds about their grey scale, and about mean and std that do not fit it.

    Some rows of up to four images of each kind of file are read, spread over the table. Those that are damaged or
    hold no numbers are passed over: whoever uses them names them.
    """
    found = []
    by_kind = {kind: _looked_at(images, numbers) for kind, numbers in _kinds(images.records).items()}
    ranges = [seen for some in by_kind.values() for seen in some]
    odd = [(seen, text) for seen in ranges if (text := odd_range(seen.source, *seen[2:]))]
    if odd:
        more = f" (and {len(odd) - 1} more of {len(ranges)} that were looked at)" if len(odd) > 1 else ""
        found.append(f"{odd[0][0].source.name}{more}: {odd[0][1]}")
    found += _unlike(by_kind)
    if ranges and images.normalize is not None:
        least, most = min(seen.least for seen in ranges), max(seen.most for seen in ranges)
        found += _misfits(images.normalize.mean, images.normalize.std, least, most)
    return found


def unlike_kinds(images: ImageDataset) -> list[str]:
    """Whether the kinds of files reach unlike grey values, by a look at a few of each; nothing of a single kind."""
    kinds = _kinds(images.records)
    return _unlike({kind: _looked_at(images, numbers) for kind, numbers in kinds.items()}) if len(kinds) > 1 else []


def _kinds(records: Sequence[Record]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        found[kind_of_file(record.path)].append(number)
    return found


def _looked_at(images: ImageDataset, numbers: Sequence[int]) -> list[Seen]:
    """What `_range` says of some of these images."""
    chosen = sorted({round(place) for place in np.linspace(0, len(numbers) - 1, _LOOKED_AT)})
    return [seen for place in chosen if (seen := _range(images, numbers[place]))]


def _unlike(by_kind: Mapping[str, Sequence[Seen]]) -> list[str]:
    """Whether the kinds of files, each on its own scale from black to white, use unlike shares of it."""
    reach = {kind: float(np.median([seen.most for seen in some])) for kind, some in by_kind.items() if some}
    if len(reach) < 2 or max(reach.values()) <= _UNLIKE * min(reach.values()):
        return []
    told = ", ".join(f"{value:.2g} in {kind}" for kind, value in reach.items())
    return [
        f"files of several kinds reach unlike grey values ({told}; 0 black to 1 white), by which a network tells them "
        "apart: bring them to one scale (--voi, --white, gigamorph data convert)"
    ]


def _range(images: ImageDataset, number: int) -> Seen | None:
    """The sampled grey values of an image; None if it cannot be read."""
    try:
        return _sampled(images.opened(images.records[number], None))
    except DataError:
        return None


def odd_grey(source: ImageSource) -> str:
    """`odd_range` of an image, from a sample of its rows; the normalisation does not matter."""
    seen = _sampled(ImageSource(source.stored, flip=False, channels=source.shape[0], white=source.full))
    return "" if seen is None else odd_range(seen.source, *seen[2:])


def _sampled(source: ImageSource) -> Seen | None:
    """The sampled grey values of an image without normalisation; None if they are not finite."""
    _, height, width = source.shape
    strips = [source.read(top, bottom, 0, width) for top, bottom in sample_rows(height)]
    values = np.concatenate([strip.flatten().numpy() for strip in strips])
    least, most = float(values.min()), float(values.max())
    if not np.isfinite([least, most]).all():
        return None  # the network refuses it by name
    bright = float(np.partition(values, last := int(0.999 * (len(values) - 1)))[last])
    return Seen(source, least, most, bright, float((values >= 1).mean()))


def _misfits(mean: Sequence[float], std: Sequence[float], least: float, most: float) -> list[str]:
    found = []
    told = f"the images' grey values go from {least:.3g} to {most:.3g}, 0 black to 1 white"
    for value in mean:
        if value != 0 and not least <= value <= most:
            found.append(f"mean {value:g} is no grey value of these images; {told}: divide it by the value of white")
            break
    for value in std:
        if value != 1 and value > max(most - least, 1e-6):
            found.append(f"std {value:g} is more than the whole range; {told}: divide it by the value of white")
            break
    return found
