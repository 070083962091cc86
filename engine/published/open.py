"""Published networks, ready to predict: a folder's network, or the networks of an ensemble as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..accelerate import Accelerated, accelerate
from ..datasets.tables import Record
from ..errors import GigamorphError
from ..models import create_model
from ..models.folder import Description, read_description
from ..train.data import Images
from .ensemble import Ensemble, Member, Published
from .images import PublishedImages

Opened = tuple["Published | Ensemble", list[str], Callable[[Sequence[Record]], Images]]


def open_published(folder: str | Path, *, memory_budget: int | None, device: str) -> Opened:
    """The network of a folder in a budget and on a device, the names of its outputs, and what opens images for it.

    Raises:
        DataError: if the folder is damaged.
        GigamorphError: its network cannot be built, or gives features and no predictions.
    """
    folder = Path(folder)
    description = read_description(folder)
    if not description.outputs.predicts:
        raise GigamorphError(
            f"{folder}: its network gives features, no predictions; fine-tune it: gigamorph train --init {folder}"
        )
    wanted = description.preprocessing
    plain = description.flips == ((False, False),)
    if plain and not description.members:
        net = Published(_accelerated(folder, memory_budget, device), str(folder))
        return net, description.outputs.names, lambda records: PublishedImages(records, wanted, wanted)
    members = _members(folder, description, memory_budget, device)
    ensemble = Ensemble(members, description)
    return ensemble, description.outputs.names, lambda records: PublishedImages(records, None, wanted)


def _members(folder: Path, description: Description, memory_budget: int | None, device: str) -> list[Member]:
    paths = [folder / name for name in description.members] or [folder]
    found = []
    for path in paths:
        own, net = read_description(path), Published(_accelerated(path, memory_budget, device), str(path))
        found.append(Member(net, own.preprocessing, own.outputs))
    return found


def _accelerated(folder: Path, memory_budget: int | None, device: str) -> Accelerated:
    return accelerate(create_model(str(folder)).to(device), memory_budget, fallback="whole").eval()
