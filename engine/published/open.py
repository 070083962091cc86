"""Published networks, ready to predict: a folder's network, or the networks of an ensemble as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accelerate import Accelerated, accelerate
from ..datasets.tables import Record
from ..datasets.views import MirroredSource
from ..errors import DataError, GigamorphError
from ..images.pixels import PixelSource
from ..models import create_model
from ..models.classifier import record
from ..models.folder import Description, Preprocessing, read_description
from ..models.outputs import Outputs, set_outputs
from ..train.data import Images
from .images import PreparedSource, PublishedImages

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


def _members(
    folder: Path, description: Description, memory_budget: int | None, device: str
) -> list[tuple[Published, Preprocessing, Outputs]]:
    paths = [folder / name for name in description.members] or [folder]
    found = []
    for path in paths:
        own = read_description(path)
        found.append((Published(_accelerated(path, memory_budget, device), str(path)), own.preprocessing, own.outputs))
    return found


def _accelerated(folder: Path, memory_budget: int | None, device: str) -> Accelerated:
    return accelerate(create_model(str(folder)).to(device), memory_budget, fallback="whole").eval()


class Published:
    """An accelerated network; an image that the network itself refuses is an error of one line that names it."""

    def __init__(self, net: Accelerated, name: str) -> None:
        self.__dict__.update(net=net, network_name=name)

    def __getattr__(self, name: str) -> Any:
        if name == "net":  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.net, name, value)

    def __call__(self, image: Any) -> Any:
        return self._told(image, lambda: self.net(image))

    def evidence_map(self, image: Any, score: Any) -> Any:
        """As `Accelerated.evidence_map`."""
        return self._told(image, lambda: self.net.evidence_map(image, score))

    def _told(self, image: Any, compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        except GigamorphError:
            raise
        except Exception:  # the network's own: whatever it raises is the answer
            one = image[0] if isinstance(image, list) else image
            shape = tuple(one.shape)[-3:]
            name = getattr(one, "name", "image")
            try:
                with torch.no_grad():
                    record(self.net._network, self.network_name, (1, *shape), "cpu")
            except GigamorphError as error:
                raise DataError(f"{name}: {error}") from error
            raise  # no fault of the image


class Ensemble:
    """Several networks, and mirror images, as one network: log-odds of the mean of their probabilities.

    A call takes an image of grey values (or a list of one) and gives log-odds (1, names).
    """

    def __init__(self, members: Sequence[tuple[Published, Preprocessing, Outputs]], description: Description) -> None:
        self.members, self.flips = list(members), description.flips
        self._numbers = description.outputs.numbers
        set_outputs(self, replace(description.outputs, averaged=True))
        self._on_tile: Any = None

    @property
    def on_tile(self) -> Any:
        """Called at each tile of each member."""
        return self._on_tile

    @on_tile.setter
    def on_tile(self, call: Any) -> None:
        self._on_tile = call
        for net, _, _ in self.members:
            net.on_tile = call

    def eval(self) -> Ensemble:
        for net, _, _ in self.members:
            net.eval()
        return self

    def __call__(self, image: Any) -> Tensor:
        source = image[0] if isinstance(image, list) else image
        found = [
            outputs.log_odds(net(PreparedSource(_mirrored(source, flip), wanted)).double())
            for net, wanted, outputs in self.members
            for flip in self.flips
        ]
        stacked = torch.stack(found)
        return stacked.mean(0) if self._numbers else mean_log_odds(stacked)

    def evidence_map(self, image: Any, score: Any) -> Any:
        """Refused: the members' maps have places of their own."""
        raise GigamorphError("an ensemble has no one map to explain; name one of its folders")

    def parameters(self) -> Any:
        """Refused, as `evidence_map`."""
        return self.evidence_map(None, None)


def mean_log_odds(log_odds: Tensor) -> Tensor:
    """Log-odds (...) of the mean of the probabilities along the first axis, without rounding them to 0 or 1."""
    logsigmoid = torch.nn.functional.logsigmoid
    return torch.logsumexp(logsigmoid(log_odds), 0) - torch.logsumexp(logsigmoid(-log_odds), 0)


def _mirrored(source: PixelSource, flip: tuple[bool, bool]) -> PixelSource:
    return MirroredSource(source, left_right=flip[0], up_down=flip[1]) if any(flip) else source
