"""Images on another grey scale than they seem: 12 bits in 16-bit files, floats from 0 to 255, a mean in grey levels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import DataError
from ..images.levels import DARK, WHITES, highest, sample_rows
from ..images.pixels import ImageSource
from .dataset import ImageDataset
from .kinds import kind_of_file
from .tables import Record

_LOOKED_AT = 4
# Rounding, and resampling with kernels that overshoot, make floats a little brighter than white.
_BRIGHT = 1.5
_UNLIKE = 2.0


def odd_range(source: ImageSource, most: float, option: str = "--white {white}, or ") -> str:
    """What is odd about the range of an image whose largest grey value is `most`, and the remedy; empty if nothing is.

    DICOM files say themselves what their values mean, and colour is not judged. option: of the command, which says
    where white is besides a column of the table; empty if it has none.
    """
    if source.stored.self_describing or source.stored.shape[0] != 1:
        return ""
    value = float(f"{most * source.full:.5g}")  # as it is stored, without the rounding of what was done since
    remedy = next((f"{white:g}" for white in WHITES if white >= value), f"{value:g}")
    column = "a column white" if option else f"{remedy} in a column white of the table"
    remedy = f"say where white is: {option.format(white=remedy)}{column}"
    if most > _BRIGHT:
        return f"grey values reach {value:g}, and white is {source.full:g}; {remedy}"
    if 0 < most <= DARK:
        return f"grey values reach only {value:g} of {source.full:g}, nearly black; {remedy}"
    return ""


def grey_warnings(images: ImageDataset, option: str = "--white {white}, or ") -> list[str]:
    """What a look at a few of the images tells about their grey scale, and about mean and std that do not fit it.

    Read are some rows of up to four images of each kind of file, spread over the table. Those that are damaged or
    hold no numbers are passed over: whoever uses them names them. option: see `odd_range`.
    """
    found = []
    by_kind = {kind: _looked_at(images, numbers) for kind, numbers in _kinds(images.records).items()}
    ranges = [seen for some in by_kind.values() for seen in some]
    odd = [text for source, _, most in ranges if (text := odd_range(source, most, option))]
    if odd:
        number = next(n for n, (source, _, most) in enumerate(ranges) if odd_range(source, most))
        more = f" (and {len(odd) - 1} more of {len(ranges)} that were looked at)" if len(odd) > 1 else ""
        found.append(f"{ranges[number][0].name}{more}: {odd[0]}")
    found += _unlike(by_kind)
    if ranges and images.normalize is not None:
        least, most = min(low for _, low, _ in ranges), max(high for _, _, high in ranges)
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


def _looked_at(images: ImageDataset, numbers: Sequence[int]) -> list[tuple[ImageSource, float, float]]:
    """What `_range` says of some of these images."""
    chosen = sorted({round(place) for place in np.linspace(0, len(numbers) - 1, _LOOKED_AT)})
    return [seen for place in chosen if (seen := _range(images, numbers[place]))]


def _unlike(by_kind: Mapping[str, Sequence[tuple[ImageSource, float, float]]]) -> list[str]:
    """Whether the kinds of files, each on its own scale from black to white, use unlike shares of it."""
    reach = {kind: float(np.median([most for _, _, most in some])) for kind, some in by_kind.items() if some}
    if len(reach) < 2 or max(reach.values()) <= _UNLIKE * min(reach.values()):
        return []
    told = ", ".join(f"{value:.2g} in {kind}" for kind, value in reach.items())
    return [
        f"files of several kinds reach unlike grey values ({told}; 0 black to 1 white), by which a network tells them "
        "apart: bring them to one scale (--voi, --white, gigamorph data convert)"
    ]


def _range(images: ImageDataset, number: int) -> tuple[ImageSource, float, float] | None:
    """An image without normalisation, and the least and largest grey value of what was read of it."""
    try:
        source = images.opened(images.records[number], None)
        _, height, width = source.shape
        strips = [source.read(top, bottom, 0, width) for top, bottom in sample_rows(height)]
    except DataError:
        return None
    least, most = min(float(strip.min()) for strip in strips), max(highest(strip) for strip in strips)
    return (source, least, most) if np.isfinite([least, most]).all() else None  # the network refuses it by name


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
