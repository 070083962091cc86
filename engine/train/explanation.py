"""Explanation maps of the log-odds of a class, their position in the file, and their relevant parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from ..accelerate import Accelerated
from ..datasets.views import SliceSource
from ..errors import GigamorphError
from ..evaluate.class_names import positive_number
from ..images.affine import Affine, CoordinateMap
from ..images.pixels import PixelSource, as_stored, to_original
from ..models.outputs import Outputs, outputs_of
from ..torch_private import tree_leaves
from .stages import restored


@dataclass(frozen=True)
class Explanation:
    """A map of an image, one value per cell, with its position in the file.

    Attributes:
        source: the image that the network saw.
        values: (h, w) float.
        cells: transforms coordinates of cells (column j covers j to j + 1) to those of the source's pixels; None if the
            cells divide the image into equal parts.
        log_odds: the image's log-odds of a class, of which the values are contributions; None if they are not.
        adds_up: whether the values sum to the log-odds, as after a mean; False after a maximum.
        border: rows and columns of cells at each side of the image that see as much padding as image.
    """

    source: PixelSource
    values: Tensor
    cells: Affine | None = None
    log_odds: float | None = None
    adds_up: bool = True
    border: tuple[int, int] = (0, 0)

    @property
    def in_source(self) -> Affine:
        """The transform from cells to pixels of the image that the network saw."""
        height, width = self.values.shape[-2:]
        return self.cells or Affine.scale(self.source.shape[-1] / width, self.source.shape[-2] / height)

    @property
    def place(self) -> CoordinateMap:
        """The transform from cells to pixels of the stored file, which undoes mirroring, cropping and averaging."""
        return to_original(as_stored(self.source)).inverse() @ to_original(self.source) @ self.in_source

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the file."""
        height, width = as_stored(self.source).shape[-2:]
        return height, width

    def read(self, top: int, bottom: int, left: int, right: int, *, stored: bool = True) -> np.ndarray:
        """The map in a region, float32: bilinear between the centres of cells, 0 outside the image.

        A map with one value per pixel is returned unchanged.

        Args:
            top, bottom, left, right: the region, in pixels.
            stored: whether the region is one of the stored file, or of the image that the network saw.
        """
        _, height, width = self.source.shape
        x0, y0, x1, y1 = self.in_source.inverse().boxes([0, 0, width, height]).tolist()
        place = self.place if stored else self.in_source
        return place.resample(self._values, top, bottom, left, right, (x0, y0, x1, y1))

    def points(self, cells: np.ndarray) -> np.ndarray:
        """Centres of cells (n, 2), each (x, y), as points of the file, clipped to the image."""
        _, height, width = self.source.shape
        inside = self.in_source.points(cells).clip(0.5, [width - 0.5, height - 0.5])
        return (to_original(as_stored(self.source)).inverse() @ to_original(self.source)).points(inside)

    @cached_property
    def _values(self) -> np.ndarray:
        return self.values.detach().float().cpu().numpy()

    def relative(self) -> Explanation:
        """The map of relevance in [0, 1] that is drawn.

        The excess of a cell is e = max(value - `baseline` value, 0). All cells together contribute S to the log-odds z,
        the sum of e, or after a maximum the largest e. The relevance of a cell is

            sigmoid(z - S + S e / max e) - sigmoid(z - S),

        so that the strongest cell shows by how much the excess raises the probability, on the same scale for all
        images. For maps that are not contributions to log-odds, the relevance is e / max e.
        """
        excess = (self.values.detach().double().cpu() - baseline(self.values, self.border)).clamp(min=0)
        share = excess / excess.max().clamp(min=torch.finfo(torch.float64).tiny)
        if self.log_odds is not None:
            total = float(excess.sum() if self.adds_up else excess.max())
            without = self.log_odds - total
            share = torch.from_numpy(expit(without + total * share.numpy()) - expit(without))
        return replace(self, values=share.float())


def baseline(values: Tensor, border: tuple[int, int] = (0, 0)) -> Tensor:
    """The baseline of a map (h, w): its median, at least 0, as float64 (h, w).

    Networks may respond to padding all along a border. In the border's rows and columns of cells, the baseline is the
    median of the row or column, if that is larger.
    """
    values = values.detach().double().cpu()
    middle = values.median().clamp(min=0)
    rows, columns = (values.median(axis, keepdim=True).values.sub(middle).clamp(min=0) for axis in (1, 0))
    rows[border[0] : max(len(rows) - border[0], border[0])] = 0
    columns[:, border[1] : max(columns.shape[1] - border[1], border[1])] = 0
    return middle + rows + columns


Result = tuple[Explanation, Tensor, int]
"""A map, the logits (classes,), and the class that the map explains."""


class SelfExplaining(ABC):
    """A network that computes its own explanations, such as an ensemble with one map of all members."""

    @abstractmethod
    def explain_class(self, source: PixelSource, which: int | None) -> Result:
        """See `explain_class`."""

    @abstractmethod
    def explain_gradient(self, source: PixelSource, which: int | None) -> Result:
        """See `explain_gradient`."""


def explain_class(net: Accelerated | SelfExplaining, source: PixelSource, which: int | None = None) -> Result:
    """The class activation map of the log-odds of a class against all others, computed tile by tile.

    It is the sum over channels of d log-odds / d channel x channel, for the last map before the global pooling (Zhou et
    al., 2016; for average pooling it equals Grad-CAM, Selvaraju et al., 2017, before its rectification). It takes two
    tiled inference passes.

    Args:
        net: in evaluation mode; its output is (1, classes).
        source: the image, or a volume, of which the slice with the highest value is explained.
        which: the class; None takes the second of two, else the most probable one.

    Returns:
        The map, the logits (classes,), and the class.

    Raises:
        GigamorphError: as `Accelerated.evidence`.
    """
    if isinstance(net, SelfExplaining):
        return net.explain_class(source, which)
    heads = outputs_of(net)
    found = net.evidence_map(source, lambda outputs: log_odds_of(outputs, class_of(outputs, which, heads), heads))
    number = class_of(found.outputs, which, heads)
    cells = Affine(
        xx=found.columns.stride,
        x0=found.columns.first + (1 - found.columns.stride) / 2,
        yy=found.rows.stride,
        y0=found.rows.first + (1 - found.rows.stride) / 2,
    )
    log_odds = None
    if heads is None or not heads.numbers:
        log_odds = float(log_odds_of(found.outputs.double(), number, heads)[0])
    # The central half of a cell's receptive field matters most; at most a quarter of a small map is border.
    near = (ceil(axis.extent / 4 / axis.stride) for axis in (found.rows, found.columns))
    height, width = found.values.shape[-2:]
    border = min(next(near), height // 4), min(next(near), width // 4)
    shown, values = _top_slice(source, found.values[0])
    return Explanation(shown, values, cells, log_odds, found.adds_up, border), found.outputs[0], number


def _top_slice(source: PixelSource, values: Tensor) -> tuple[PixelSource, Tensor]:
    """The slice of a volume with the highest value, and its map (h, w); images are returned unchanged.

    Args:
        source: the image or volume.
        values: (h, w), or (d, h, w) with d parts of equal numbers of slices. A network that joins the slices has (h, w)
            for a volume, too: its middle slice is shown.
    """
    if len(source.shape) == 3:
        return source, values
    if values.dim() == 2:
        return SliceSource(source, source.shape[1] // 2), values
    part = int(values.flatten(1).amax(1).argmax())
    number = int((part + 0.5) * source.shape[1] / len(values))
    return SliceSource(source, number), values[part]


def explain_gradient(net: Accelerated | SelfExplaining, source: PixelSource, which: int | None) -> Result:
    """Saliency of every pixel: the maximum over channels of the absolute `gradient` of the log-odds of a class.

    Arguments and results are those of `explain_class`.
    """
    if isinstance(net, SelfExplaining):
        return net.explain_gradient(source, which)
    found, logits, number = gradient(net, source, which)
    return Explanation(*_top_slice(source, found.abs().amax(0))), logits, number


def gradient(net: Accelerated, source: PixelSource, which: int | None) -> tuple[Tensor, Tensor, int]:
    """The gradient (C, H, W) of the log-odds of a class with respect to the pixels that the network sees.

    Of a volume it is (C, D, H, W).

    Args:
        net: the network.
        source: the image.
        which: the class, see `explain_class`.

    Returns:
        The gradient, the logits (classes,), and the class.
    """
    net.eval()
    height, width = source.shape[-2:]
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    image = source.read(0, height, 0, width)[None].to(dtype).requires_grad_()
    with restored(net), torch.enable_grad():
        net.requires_grad_(False)  # gradients of parameters would cost time and memory
        found = next(t for t in tree_leaves(net(image)) if isinstance(t, Tensor)).reshape(1, -1)
        heads = outputs_of(net)
        number = class_of(found, which, heads)
        (by_pixel,) = torch.autograd.grad(log_odds_of(found, number, heads)[0], image)
    return by_pixel[0], found[0].detach(), number


def caption(label: str, log_odds: float, number: bool = False) -> str:
    """The caption of an explanation; for a predicted number, `log_odds` is the number itself."""
    if number:
        return f"{label}: {log_odds:.4g}"
    return f"{label}: probability {expit(log_odds):.3f}, log-odds {log_odds:+.2f}"


def positive_class(classes: Sequence[str], heads: Outputs | None) -> int | None:
    """The index of the positive one of two classes, by its name; otherwise None, see `explain_class`.

    Args:
        classes: names of the classes.
        heads: the network's outputs if they are not one softmax; None is returned for several heads.
    """
    exclusive = heads is None or heads.exclusive
    return positive_number(classes) if exclusive and len(classes) == 2 else None


def class_of(outputs: Tensor, which: int | None, heads: Outputs | None = None) -> int:
    """The class to explain: `which`, else the second of two, else the most probable one.

    By default it is a class of the first head; for labels that do not exclude each other, the most probable one.

    Args:
        outputs: logits (1, classes).
        which: index of the class, also negative, or None.
        heads: the meaning of the outputs if they are not one softmax.

    Raises:
        GigamorphError: if the class does not exist.
    """
    names = outputs.shape[1] if heads is None else len(heads.names)
    if which is None:
        if heads is None:
            return names - 1 if names <= 2 else int(outputs[0].argmax())
        first = len(heads.heads[0].classes)
        if heads.exclusive and first <= 2:
            return first - 1
        return int(heads.log_odds(outputs)[0, :first].argmax())
    if not -names <= which < names:
        raise GigamorphError(f"output {which} does not exist; the network has {names} outputs")
    return which % names


def log_odds_of(outputs: Tensor, which: int, heads: Outputs | None = None) -> Tensor:
    """Log-odds (N,) of a class against all others from logits (N, classes); a single output is returned unchanged."""
    if heads is not None:
        return heads.log_odds(outputs)[:, which]
    others = torch.cat([outputs[:, :which], outputs[:, which + 1 :]], 1)
    return outputs[:, which] - (torch.logsumexp(others, 1) if others.shape[1] else 0)
