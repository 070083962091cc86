"""`load`: opens the results of `gigamorph train` and `gigamorph import` to predict in Python."""

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
from .published.classifier import open_classifier
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
        """An image file, preprocessed as in training: grey values, mirrored, scaled, normalised.

        A pixel source is returned unchanged.

        Raises:
            DataError: if the file cannot be read.
        """
        return self._item(path)["image"]

    def _item(self, path: Image) -> dict[str, Any]:
        if isinstance(path, PixelSource):
            return {"image": path, "record": Record(Path(path.name), -1, path.name, patient_known=False)}
        if not isinstance(path, (str, Path)):
            kind = type(path).__name__
            raise GigamorphError(f"an image must be the path of a file or a pixel source (open_pixels), not {kind}")
        return self._open([Record(Path(path), -1, Path(path).name, patient_known=False)])[0]


@dataclass(frozen=True)
class Trained(_Network):
    """A trained classifier, its classes, and its images.

    Attributes:
        net: the accelerated network, in evaluation mode: pixel sources or (N, C, H, W) -> (N, outputs).
        classes: names of the outputs.
    """

    def predict(self, images: Image | Sequence[Image]) -> Tensor:
        """Probabilities, (N, classes) float64 on the CPU, as `gigamorph predict` writes them without calibration.

        A regression network returns its predicted numbers instead.

        Args:
            images: image files, or pixel sources preprocessed as by `open`; computed one by one.

        Raises:
            DataError: if a file cannot be read. BudgetError: if no tile of it fits.
        """
        paths = _as_list(images)
        found = torch.empty(len(paths), len(self.classes), dtype=torch.float64)
        with torch.no_grad():
            for row, path in zip(found, paths, strict=True):
                item = self._item(path)
                one = prediction(item, self.net(item["image"])[0], outputs_of(self.net))
                row.copy_(torch.tensor(one.log_odds if one.numbers else one.probabilities, dtype=torch.float64))
        return found

    def predict_exam(self, views: Image | Sequence[Image]) -> Tensor:
        """Probabilities (classes,) of an exam of several views, for a network trained with ``--views``.

        Args:
            views: image files, or pixel sources.

        Raises:
            GigamorphError: if the network was trained on single images. DataError, BudgetError: as `predict`.
        """
        outputs = outputs_of(self.net)
        if outputs is None or outputs.views is None:
            raise GigamorphError("this network was trained on single images; call predict and combine its results")
        paths = _as_list(views)
        if not paths:
            raise GigamorphError("an exam must have at least one view; pass the paths of its images")
        with torch.no_grad():
            rows = torch.cat([self.net(self._item(path)["image"]) for path in paths]).double().cpu()
        log_odds = outputs.log_odds(outputs.together(rows))[0]
        return log_odds if outputs.numbers else torch.sigmoid(log_odds)


@dataclass(frozen=True)
class TrainedMasks(_Network):
    """A trained segmentation network (``gigamorph train --task masks``), its classes, and its images.

    Attributes:
        net: the accelerated network, in evaluation mode: pixel sources or (N, C, H, W) -> (N, H', W') uint8, the index
            of the likeliest class for each position of its map.
        classes: names of the classes; the background is the first.
    """

    def predict(self, images: Image | Sequence[Image]) -> list[Tensor]:
        """The mask of each image, uint8 (rows, columns) on the CPU, in the size and orientation of its file.

        Each pixel is the index of a class, as `gigamorph predict` writes it.

        Args:
            images: image files, or pixel sources preprocessed as by `open`; computed one by one.

        Raises:
            DataError: if a file cannot be read. BudgetError: if no tile of it fits.
        """
        return [torch.from_numpy(mask_of(self.net, self.open(path))) for path in _as_list(images)]


def load(
    path: str | Path,
    *,
    memory_budget: int | str | None = None,
    device: torch.device | str | None = None,
    flips: Sequence[str] = (),
    trust: bool = False,
) -> Trained | TrainedMasks:
    """Load a trained network to predict with it.

    Args:
        path: a checkpoint of `gigamorph train` or of a recipe, or a folder of `gigamorph import`. A folder of
            `gigamorph train --folds` is loaded as the mean of its networks.
        memory_budget: bytes for one image (``"4GiB"``), as in `accelerate`.
        device: device of the computation; defaults to the GPU, or the CPU if there is none.
        flips: mirror images over which probabilities are also averaged, as by `gigamorph predict --flip`: any of
            "left-right", "up-down" and "both".
        trust: import modules that only the file names, which runs their code; see `gigamorph.engine.trust`.

    Raises:
        UntrustedError: the file names a module that neither `trust` nor your configuration allows.
        DataError: the file is not a checkpoint, or its network neither classifies whole images nor returns masks.
    """
    try:
        torch.device(device or "cpu")
    except RuntimeError as error:
        raise GigamorphError(f"unknown device {device!r}; use cpu or cuda") from error
    chosen = str(device) if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    flips = [flips] if isinstance(flips, str) else flips
    with trusted(trust):
        if gives_masks(path):
            if flips:
                raise GigamorphError(f"{path}: flips cannot be used with a segmentation network; omit flips")
            segmenter = open_segmenter(path, memory_budget=budget, device=chosen)
            segmenter.net.eval()
            return TrainedMasks(segmenter.net, segmenter.target.names, segmenter.open_images)
        found = open_classifier(path, memory_budget=budget, device=chosen, flips=flips)
    found.net.eval()
    return Trained(found.net, tuple(found.classes), found.open_images)


def _as_list(images: Image | Sequence[Image]) -> list[Image]:
    return [images] if isinstance(images, (str, Path, PixelSource)) else list(images)
