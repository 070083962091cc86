"""A trained network in Python: `load` opens what `gigamorph train` and `gigamorph import` have left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .datasets.tables import Record
from .errors import GigamorphError
from .images.pixels import PixelSource
from .models.outputs import outputs_of
from .predict.masks import gives_masks, mask_of, open_segmenter
from .recipes.networks import open_classifier
from .tiling.memory import parse_bytes
from .train.classify import prediction
from .train.data import Images
from .trust import trusted

Image = str | Path | PixelSource


@dataclass(frozen=True)
class _Network:
    """A network, its classes, and its images."""

    net: Any
    classes: tuple[str, ...]
    _open: Callable[[Sequence[Record]], Images] = field(repr=False)

    def open(self, path: Image) -> PixelSource:
        """An image file prepared as in training: grey values, mirrored, scaled, normalised.

        A pixel source is taken as it is.

        Raises:
            DataError: if it cannot be read.
        """
        return self._item(path)["image"]

    def _item(self, path: Image) -> dict[str, Any]:
        if isinstance(path, PixelSource):
            return {"image": path, "record": Record(Path(path.name), -1, path.name, patient_known=False)}
        if not isinstance(path, (str, Path)):
            kind = type(path).__name__
            raise GigamorphError(f"an image is the path of its file, or a pixel source (open_pixels), not {kind}")
        return self._open([Record(Path(path), -1, Path(path).name, patient_known=False)])[0]


@dataclass(frozen=True)
class Trained(_Network):
    """A trained classifier, its classes, and its images.

    Attributes:
        net: the accelerated network, in evaluation mode: pixel sources or (N, C, H, W) -> (N, outputs).
        classes: names of the outputs.
    """

    def predict(self, images: Image | Sequence[Image]) -> Tensor:
        """Probabilities, (N, classes) float64 on the CPU: those that `gigamorph predict` writes, without calibration.

        Of a network of numbers it is these.

        Args:
            images: image files, or pixel sources that are prepared as `open` does it; computed one by one.

        Raises:
            DataError: if a file cannot be read. BudgetError: if no tile of it fits.
        """
        paths = _listed(images)
        found = torch.empty(len(paths), len(self.classes), dtype=torch.float64)
        with torch.no_grad():
            for row, path in zip(found, paths, strict=True):
                item = self._item(path)
                one = prediction(item, self.net(item["image"])[0], outputs_of(self.net))
                row.copy_(torch.tensor(one.log_odds if one.numbers else one.probabilities, dtype=torch.float64))
        return found

    def predict_exam(self, views: Image | Sequence[Image]) -> Tensor:
        """Probabilities (classes,) of an exam of several views, by a network that was trained on such (``--views``).

        Args:
            views: image files, or pixel sources.

        Raises:
            GigamorphError: if it was trained on single images. DataError, BudgetError: as `predict`.
        """
        outputs = outputs_of(self.net)
        if outputs is None or outputs.views is None:
            raise GigamorphError("this network was trained on single images; take predict, and combine them yourself")
        paths = _listed(views)
        if not paths:
            raise GigamorphError("an exam has one view at least")
        with torch.no_grad():
            rows = torch.cat([self.net(self._item(path)["image"]) for path in paths]).double().cpu()
        log_odds = outputs.log_odds(outputs.together(rows))[0]
        return log_odds if outputs.numbers else torch.sigmoid(log_odds)


@dataclass(frozen=True)
class TrainedMasks(_Network):
    """A trained network of masks (``gigamorph train --task masks``), its classes, and its images.

    Attributes:
        net: the accelerated network, in evaluation mode: pixel sources or (N, C, H, W) -> (N, H', W') uint8, the number
            of the likeliest class of each place of its map.
        classes: their names, the background's first.
    """

    def predict(self, images: Image | Sequence[Image]) -> list[Tensor]:
        """The mask of each image, uint8 (rows, columns) on the CPU, in the size and orientation of its file.

        The number of a class in each pixel, as `gigamorph predict` writes it.

        Args:
            images: image files, or pixel sources that are prepared as `open` does it; computed one by one.

        Raises:
            DataError: if a file cannot be read. BudgetError: if no tile of it fits.
        """
        return [torch.from_numpy(mask_of(self.net, self.open(path))) for path in _listed(images)]


def load(
    path: str | Path,
    *,
    memory_budget: int | str | None = None,
    device: torch.device | str | None = None,
    flips: Sequence[str] = (),
    trust: bool = False,
) -> Trained | TrainedMasks:
    """Open a checkpoint of `gigamorph train` or of a recipe, or a folder of `gigamorph import`, to predict with it.

    Or the folder of `gigamorph train --folds`, as the mean of its networks.

    Args:
        path: checkpoint or folder.
        memory_budget: bytes for one image (``"4GiB"``), as in `accelerate`.
        device: where it is computed; None takes the GPU, or the CPU if there is none.
        flips: of "left-right", "up-down" and "both": probabilities are averaged over these mirror images too, as by
            `gigamorph predict --flip`.
        trust: whether a module that only the file names is imported, which runs its code; see `gigamorph.engine.trust`.

    Raises:
        UntrustedError: the network is of such a module, and neither this nor your configuration trusts it.
        DataError: if it is no checkpoint, or what was trained classifies no whole images and gives no masks.
    """
    try:
        torch.device(device or "cpu")
    except RuntimeError as error:
        raise GigamorphError(f"device {device!r} is none of torch's; take cpu or cuda") from error
    chosen = str(device) if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    flips = [flips] if isinstance(flips, str) else flips
    with trusted(trust):
        if gives_masks(path):
            if flips:
                raise GigamorphError(f"{path}: is a network of masks, which are not averaged over mirror images")
            segmenter = open_segmenter(path, memory_budget=budget, device=chosen)
            segmenter.net.eval()
            return TrainedMasks(segmenter.net, segmenter.target.names, segmenter.open_images)
        net, classes, opened = open_classifier(path, memory_budget=budget, device=chosen, flips=flips)
    net.eval()
    return Trained(net, tuple(classes), opened)


def _listed(images: Image | Sequence[Image]) -> list[Image]:
    return [images] if isinstance(images, (str, Path, PixelSource)) else list(images)
