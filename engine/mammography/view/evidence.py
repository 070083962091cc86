"""Explanation maps of predictions, as small overlays of the viewer's images."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...datasets.dataset import grey_of, with_white
from ...images.affine import Affine
from ...images.levels import White
from ...images.pixels import PixelSource
from ...models.folder import digest_of
from ...models.outputs import outputs_of
from ...published.classifier import open_classifier
from ...train.explanation import Explanation, explain_class, positive_class
from .exams import ExamImage, stored_place

SIDE = 256


class MapServer:
    """Maps of a trained network, computed on demand, one at a time.

    Args:
        checkpoint: of gigamorph train, or a folder of gigamorph import.
        memory_budget: in bytes.
        device: "cpu" or "cuda".
        flips: mirror images over which predictions are averaged.
        white: default white level for images whose table has none; None takes the network's own.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        memory_budget: int | None,
        device: str,
        flips: Sequence[str] = (),
        white: White | None = None,
    ) -> None:
        opened = open_classifier(checkpoint, memory_budget=memory_budget, device=device, flips=flips)
        self._net, self._open = opened.net, opened.open_images
        self._class = positive_class(opened.classes, outputs_of(self._net))
        self.grey = grey_of(self._open([]))
        """How the network's images are converted to grey values; empty if unknown."""
        self._net.eval()
        self._lock = threading.Lock()
        self._white: White | None = white
        self.made_by = (digest_of(checkpoint), tuple(flips), white)
        """The settings that, with the images, determine the maps."""

    def of(self, view: ExamImage, shown: PixelSource) -> NDArray[np.uint8]:
        """The relative map (height, width), at most 256 pixels per side, from 0 to 255; see `Explanation.relative`.

        Raises:
            DataError: if the image cannot be read.
            GigamorphError: if the network has no map to explain.
        """
        with self._lock:
            image = self._open(with_white([view.record], self._white))[0]["image"]
            found, _, _ = explain_class(self._net, image, self._class)
        return on_shown(found, shown)


def on_shown(found: Explanation, shown: PixelSource) -> NDArray[np.uint8]:
    """An explanation in the geometry of the displayed image: bilinear, 0 outside its cells."""
    _, height, width = shown.shape
    scale = max(height, width) / SIDE
    rows, columns = max(1, round(height / scale)), max(1, round(width / scale))
    values = found.relative().values.numpy()
    reach = (-0.5, -0.5, values.shape[1] + 0.5, values.shape[0] + 0.5)
    to_picture = Affine.scale(columns / width, rows / height) @ stored_place(shown).inverse() @ found.place
    taken = to_picture.resample(values, 0, rows, 0, columns, reach)
    return np.rint(taken.clip(0, 1) * 255).astype(np.uint8)
