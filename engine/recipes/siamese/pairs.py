"""Contralateral views: the left and the right breast in the same projection, in one geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...datasets.dataset import open_record
from ...datasets.tables import Record
from ...datasets.unknown_views import unplaced
from ...datasets.views import MirroredSource
from ...errors import DataError
from ...images.affine import Map
from ...images.pixels import Normalize, PixelSource, to_original


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
    """The pairs of a table in their order.

    Args:
        skip_unpaired: omit images without side, view, exam (where others of their patient have one) or counterpart, and
            of several of one side and view all but the first.
        say: told of how many.

    Raises:
        DataError: unless they are to be omitted, an image without side, view or exam, two images of one side and view
            of an exam, or an image without its contralateral view.
    """
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    further: list[Record] = []
    examless = set(unplaced([r.patient_id for r in records], [r.exam_id or "" for r in records]))
    for number, record in enumerate(records):
        if record.laterality is None or not record.view or number in examless:
            if not skip_unpaired:
                reason = "the table gives no laterality (L, R), view or exam, where others of its patient have one"
                raise DataError(
                    f"{record.path}: {reason}; fill it in, or leave such images out with skip_unpaired = true"
                )
            further.append(record)
            continue
        sides = found.setdefault((record.patient_id, record.exam_id or "", record.view), {})
        if record.laterality in sides and skip_unpaired:
            further.append(record)
            continue
        if record.laterality in sides:
            raise DataError(
                f"patient {record.patient_id} has two images {record.laterality} {record.view} of one exam: "
                f"{sides[record.laterality].path} and {record.path}; give them different exam_id, or leave "
                "all but the first out with skip_unpaired = true"
            )
        sides[record.laterality] = record
    alone = [next(iter(sides.values())) for sides in found.values() if len(sides) < 2]
    if alone and not skip_unpaired:
        first, more = alone[0], f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        lacking = "R" if first.laterality == "L" else "L"
        raise DataError(
            f"{first.path}: patient {first.patient_id} has no contralateral view {lacking} {first.view}{more}; add it, "
            "or leave such images out with skip_unpaired = true"
        )
    left_out = [*further, *alone]
    if left_out:
        what = "which have no contralateral view or are further ones of theirs"
        say(f"left out are {len(left_out)} of {len(records)} images, {what}: {left_out[0].path}")
    pairs = [Pair(sides["L"], sides["R"]) for sides in found.values() if len(sides) == 2]
    if not pairs:
        raise DataError("the table holds no pair of contralateral views")
    return pairs


def open_side(
    record: Record, *, mirror: Literal["auto", "table"], normalize: Normalize, channels: int, voi: str
) -> PixelSource:
    """A breast with its chest wall where that of the other one is: on the left as the file's header says ("auto"), or
    as stored if it is a left breast and mirrored if it is a right one ("table")."""
    source: PixelSource = open_record(
        record,
        normalize=normalize,
        channels=channels,
        voi=voi,
        flip="auto" if mirror == "auto" else False,
    )
    if mirror == "table" and record.laterality == "R":
        source = MirroredSource(source, left_right=True, up_down=False)
    return source


class StackedSource:
    """Two images of one size as the channels of one: the first's, then the second's."""

    def __init__(self, first: PixelSource, second: PixelSource) -> None:
        if first.shape != second.shape:
            raise DataError(f"{first.name} and {second.name} have different sizes; register them")
        self.first, self.second = first, second
        channels, height, width = first.shape
        self.shape, self.name = (2 * channels, height, width), first.name

    @property
    def to_original(self) -> Map:
        """From this image's coordinates to those of the first one's file."""
        return to_original(self.first)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return torch.cat([source.read(top, bottom, left, right) for source in (self.first, self.second)])
