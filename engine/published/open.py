"""Opens published networks for prediction: a folder's network, or an ensemble as one network."""

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
from ..train.record import with_splits
from .ensemble import Ensemble, Member, Published
from .images import PublishedImages

Opened = tuple["Published | Ensemble", list[str], Callable[[Sequence[Record]], Images], int]


def open_published(folder: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()) -> Opened:
    """Open the network of a folder with a budget on a device; return it, its output names and an opener of images.

    The fourth value is the number of images in the `gigamorph train` trainings, as far as known; the records of the
    images have the split that they were in.

    Args:
        flips: names in `FLIPS`; predictions are averaged over these mirror images too.

    Raises:
        DataError: the folder is damaged, or its logits differ from those of its import.
        GigamorphError: the network cannot be built, outputs features instead of predictions, or already averages
            over mirror images.
    """
    folder = Path(folder)
    about = read_description(folder)
    if not about.outputs.predicts:
        raise GigamorphError(
            f"{folder}: its network outputs features, not predictions; run gigamorph train --init {folder}"
        )
    wanted = about.preprocessing
    plain = about.flips == ((False, False),)
    if flips and not plain:
        already = ", ".join(name for name, pair in FLIPS.items() if pair in about.flips)
        raise GigamorphError(f"{folder}: already averages over mirrored images ({already}); remove --flip")
    seen = mirrorings(flips) if flips else about.flips
    if len(seen) == 1 and not about.members:
        net = Published(_accelerated(folder, memory_budget, device), str(folder))
        own = [about.source.get("training", {})]
        return net, about.outputs.names, lambda r: PublishedImages(add_splits(r, own), wanted, wanted), image_count(own)
    members = _members(folder, about, memory_budget, device)
    ensemble = Ensemble(members, about.outputs, seen)
    folders = [folder / name for name in about.members] or [folder]
    own = [read_description(path).source.get("training", {}) for path in folders]
    return ensemble, about.outputs.names, lambda r: PublishedImages(add_splits(r, own), None, wanted), image_count(own)


def add_splits(records: Sequence[Record], trainings: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Return records with their split in the trainings: train if any of the networks was trained on the image."""
    each = [with_splits(records, training) for training in trainings]
    of_image = ([record.split for record in records] for records in zip(*each, strict=True))
    splits = (next((name for name in SPLITS if name in own), None) for own in of_image)
    return [replace(record, split=split) for record, split in zip(records, splits, strict=True)]


def image_count(trainings: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of images in the largest training."""
    return max(sum(training.get("split", {}).get(name, 0) for name in SPLITS) for training in trainings)


def _members(folder: Path, about: Description, memory_budget: int | None, device: str) -> list[Member]:
    paths = [folder / name for name in about.members] or [folder]
    found = []
    for path in paths:
        own, net = read_description(path), Published(_accelerated(path, memory_budget, device), str(path))
        found.append(Member(net, own.preprocessing, own.outputs))
    return found


def _accelerated(folder: Path, memory_budget: int | None, device: str) -> Accelerated:
    return accelerate(open_checked(folder).to(device), memory_budget, fallback="untiled").eval()
