"""Contralateral views: the left and the right breast in the same projection and geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ....datasets.dataset import open_record
from ....datasets.tables import Record
from ....datasets.unknown_views import unplaced
from ....datasets.views import MirroredSource
from ....errors import DataError
from ....images.affine import CoordinateMap
from ....images.pixels import Normalize, PixelSource, to_original


@dataclass(frozen=True)
class Pair:
    """Two images of one exam and view."""

    left: Record
    right: Record

    @property
    def name(self) -> str:
        """Patient, exam and view, for messages and tables."""
        exam = self.left.exam_id or ""
        parts = self.left.patient_id, "" if exam == self.left.patient_id else exam, self.left.view
        return " ".join(part for part in parts if part)


def find_pairs(
    records: Sequence[Record], *, skip_unpaired: bool = False, say: Callable[[str], object] = lambda text: None
) -> list[Pair]:
    """Return the pairs of a table in order.

    Args:
        skip_unpaired: omit images without side, view, exam (if others of their patient have one) or counterpart, and
            all but the first of several images of one side and view.
        say: called with a summary of the omitted images.

    Raises:
        DataError: the table has no pair; or, unless they are omitted, an image has no side, view, exam or contralateral
            view, or an exam has two images of one side and view.
    """
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    extra: list[Record] = []
    examless = set(unplaced([r.patient_id for r in records], [r.exam_id or "" for r in records]))
    for number, record in enumerate(records):
        if record.laterality is None or not record.view or number in examless:
            if not skip_unpaired:
                reason = "the table has no laterality (L, R), view or exam for it, but for others of its patient"
                raise DataError(f"{record.path}: {reason}; fill it in, or omit such images with skip_unpaired = true")
            extra.append(record)
            continue
        sides = found.setdefault((record.patient_id, record.exam_id or "", record.view), {})
        if record.laterality in sides and skip_unpaired:
            extra.append(record)
            continue
        if record.laterality in sides:
            raise DataError(
                f"patient {record.patient_id} has two images {record.laterality} {record.view} of one exam: "
                f"{sides[record.laterality].path} and {record.path}; give them different exam_id, or omit "
                "all but the first with skip_unpaired = true"
            )
        sides[record.laterality] = record
    unpaired = [next(iter(sides.values())) for sides in found.values() if len(sides) < 2]
    if unpaired and not skip_unpaired:
        first, more = unpaired[0], f" (and {len(unpaired) - 1} more)" if len(unpaired) > 1 else ""
        missing = "R" if first.laterality == "L" else "L"
        raise DataError(
            f"{first.path}: patient {first.patient_id} has no contralateral view {missing} {first.view}{more}; add it, "
            "or omit such images with skip_unpaired = true"
        )
    left_out = [*extra, *unpaired]
    if left_out:
        what = "which have no contralateral view or repeat a side and view"
        say(f"omitted {len(left_out)} of {len(records)} images, {what}: {left_out[0].path}")
    pairs = [Pair(sides["L"], sides["R"]) for sides in found.values() if len(sides) == 2]
    if not pairs:
        raise DataError("the table contains no pair of contralateral views")
    return pairs


def open_side(
    record: Record, *, mirror: Literal["auto", "table"], normalize: Normalize, channels: int, voi: str
) -> PixelSource:
    """Open a breast with its chest wall on the same side as the other one's: on the left according to the file's header
    ("auto"), or as stored for a left breast and mirrored for a right one ("table")."""
    source: PixelSource = open_record(
        record, normalize=normalize, channels=channels, voi=voi, flip="auto" if mirror == "auto" else False
    )
    if mirror == "table" and record.laterality == "R":
        source = MirroredSource(source, left_right=True, up_down=False)
    return source


class StackedSource:
    """Two images of one size as the channels of one image: the first's, then the second's."""

    def __init__(self, first: PixelSource, second: PixelSource) -> None:
        if first.shape != second.shape:
            raise DataError(f"{first.name} and {second.name} have different sizes; register them")
        self.first, self.second = first, second
        channels, height, width = first.shape
        self.shape, self.name = (2 * channels, height, width), first.name

    @property
    def to_original(self) -> CoordinateMap:
        """Map from this image's coordinates to those of the first one's file."""
        return to_original(self.first)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return torch.cat([source.read(top, bottom, left, right) for source in (self.first, self.second)])
