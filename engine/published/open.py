"""Published networks, ready to predict: a folder's network, or the networks of an ensemble as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..accelerate import Accelerated, accelerate
from ..datasets.flips import FLIPS
from ..datasets.tables import SPLITS, Record
from ..datasets.views import mirrorings
from ..errors import GigamorphError
from ..models.folder import Description, read_description
from ..models.registry import open_checked
from ..train.data import Images
from ..train.splits import with_splits
from .ensemble import Ensemble, Member, Published
from .images import PublishedImages

Opened = tuple["Published | Ensemble", list[str], Callable[[Sequence[Record]], Images], int]


def open_published(folder: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()) -> Opened:
    """The network of a folder in a budget and on a device, the names of its outputs, and what opens images for it.

    And how many images the trainings of `gigamorph train` had, of which it is known; the images' records say which
    split of them they were in.

    Args:
        flips: of `FLIPS`; predictions are averaged over these mirror images too.

    Raises:
        DataError: if the folder is damaged, or its network gives other logits than when it was imported.
        GigamorphError: its network cannot be built, gives features and no predictions, or averages over mirror images
            already.
    """
    folder = Path(folder)
    description = read_description(folder)
    if not description.outputs.predicts:
        raise GigamorphError(
            f"{folder}: its network gives features, no predictions; fine-tune it: gigamorph train --init {folder}"
        )
    wanted = description.preprocessing
    plain = description.flips == ((False, False),)
    if flips and not plain:
        already = ", ".join(name for name, pair in FLIPS.items() if pair in description.flips)
        raise GigamorphError(f"{folder}: is averaged over mirrored images already ({already}); leave --flip out")
    seen = mirrorings(flips) if flips else description.flips
    if len(seen) == 1 and not description.members:
        net = Published(_accelerated(folder, memory_budget, device), str(folder))
        own = [description.source.get("training", {})]
        return net, description.outputs.names, lambda r: PublishedImages(learnt(r, own), wanted, wanted), count_of(own)
    members = _members(folder, description, memory_budget, device)
    ensemble = Ensemble(members, description.outputs, seen)
    folders = [folder / name for name in description.members] or [folder]
    all_ = [read_description(path).source.get("training", {}) for path in folders]
    return ensemble, description.outputs.names, lambda r: PublishedImages(learnt(r, all_), None, wanted), count_of(all_)


def learnt(records: Sequence[Record], trainings: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Records with the split that they had in the trainings: train if any of the networks has learnt from an image."""
    each = [with_splits(records, training) for training in trainings]
    of_image = ([record.split for record in records] for records in zip(*each, strict=True))
    splits = (next((name for name in SPLITS if name in own), None) for own in of_image)
    return [replace(record, split=split) for record, split in zip(records, splits, strict=True)]


def count_of(trainings: Sequence[Mapping[str, Any]]) -> int:
    """Images of the largest of the trainings."""
    return max(sum(training.get("split", {}).get(name, 0) for name in SPLITS) for training in trainings)


def _members(folder: Path, description: Description, memory_budget: int | None, device: str) -> list[Member]:
    paths = [folder / name for name in description.members] or [folder]
    found = []
    for path in paths:
        own, net = read_description(path), Published(_accelerated(path, memory_budget, device), str(path))
        found.append(Member(net, own.preprocessing, own.outputs))
    return found


def _accelerated(folder: Path, memory_budget: int | None, device: str) -> Accelerated:
    return accelerate(open_checked(folder).to(device), memory_budget, fallback="whole").eval()
