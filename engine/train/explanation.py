"""What the log-odds of a class rest on: a map with its place in the file, and what of it stands out."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..accelerate import Accelerated
from ..errors import GigamorphError
from ..evaluate.class_names import positive_number
from ..images.affine import Affine, Map
from ..images.pixels import PixelSource, as_stored, to_original
from ..models.outputs import Outputs, outputs_of


@dataclass(frozen=True)
class Explanation:
    """A map of an image, one value a cell, with its place in the file.

    Attributes:
        source: the image that the network saw.
        values: (h, w) float.
        cells: from the coordinates of cells (column j covers j to j + 1) to those of the source's pixels; None for
            cells that cover the image in equal parts.
        log_odds: what the values are a part of: the image's log-odds of a class; None where they are no such thing.
        adds_up: whether the values of cells add up in it, as after a mean; after a maximum they do not.
        border: rows and columns of cells at each side of the image that look at padding as much as at the image.
    """

    source: PixelSource
    values: Tensor
    cells: Affine | None = None
    log_odds: float | None = None
    adds_up: bool = True
    border: tuple[int, int] = (0, 0)

    @property
    def in_source(self) -> Affine:
        """From cells to the pixels of the image that the network saw."""
        height, width = self.values.shape[-2:]
        return self.cells or Affine.scale(self.source.shape[2] / width, self.source.shape[1] / height)

    @property
    def place(self) -> Map:
        """From cells to pixels of the file as stored: mirroring, cropping and averaging undone."""
        return to_original(as_stored(self.source)).inverse() @ to_original(self.source) @ self.in_source

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the file."""
        return as_stored(self.source).shape[1:]

    def read(self, top: int, bottom: int, left: int, right: int, *, stored: bool = True) -> np.ndarray:
        """The map on a region of the file, float32: bilinear between the middles of cells, 0 outside of the image.

        A map of one value a pixel comes back as it is.

        Args:
            stored: of the file as stored; otherwise of the image that the network saw.
        """
        _, height, width = self.source.shape
        x0, y0, x1, y1 = self.in_source.inverse().boxes([0, 0, width, height]).tolist()
        place = self.place if stored else self.in_source
        return place.resample(self._values, top, bottom, left, right, (x0, y0, x1, y1))

    def points(self, cells: np.ndarray) -> np.ndarray:
        """Middles of cells (n, 2), each (x, y), as points of the file, none outside of the image."""
        _, height, width = self.source.shape
        inside = self.in_source.points(cells).clip(0.5, [width - 0.5, height - 0.5])
        return (to_original(as_stored(self.source)).inverse() @ to_original(self.source)).points(inside)

    @cached_property
    def _values(self) -> np.ndarray:
        return self.values.detach().float().cpu().numpy()

    def relative(self) -> Explanation:
        """What of it stands out, as it is drawn: in [0, 1].

        Standing out is e = value - what is usual (`usual`), where that is positive. All of it together gives S to the
        log-odds z: the sum of e, or after a maximum the largest. A place is drawn as

            sigmoid(z - S + S e / max e) - sigmoid(z - S),

        so that the strongest one shows by how much the probability rises for what stands out, and the scale is the same
        for all images. Of maps that are no log-odds it is e / max e.
        """
        excess = (self.values.detach().double().cpu() - usual(self.values, self.border)).clamp(min=0)
        share = excess / excess.max().clamp(min=torch.finfo(torch.float64).tiny)
        if self.log_odds is not None:
            total = float(excess.sum() if self.adds_up else excess.max())
            without = self.log_odds - total
            share = torch.from_numpy(expit(without + total * share.numpy()) - expit(without))
        return replace(self, values=share.float())


def usual(values: Tensor, border: tuple[int, int] = (0, 0)) -> Tensor:
    """What half of a map (h, w) has anyway, float64 (h, w), not below 0.

    Networks may answer to padding all along a border. Of the rows and columns of cells there it is what half of such a
    row or column has, where that is more.
    """
    values = values.detach().double().cpu()
    middle = values.median().clamp(min=0)
    rows, columns = (values.median(axis, keepdim=True).values.sub(middle).clamp(min=0) for axis in (1, 0))
    rows[border[0] : max(len(rows) - border[0], border[0])] = 0
    columns[:, border[1] : max(columns.shape[1] - border[1], border[1])] = 0
    return middle + rows + columns


Explained = tuple[Explanation, Tensor, int]
"""A map, the logits (classes,), and the class that it is of."""


class SelfExplaining(ABC):
    """A network of several: what they say of an image is one map."""

    @abstractmethod
    def explain_class(self, source: PixelSource, which: int | None) -> Explained:
        """As the function of this name."""

    @abstractmethod
    def explain_gradient(self, source: PixelSource, which: int | None) -> Explained:
        """As the function of this name."""


def explain_class(net: Accelerated | SelfExplaining, source: PixelSource, which: int | None = None) -> Explained:
    """The class activation map of the log-odds of a class against all others, computed by tiles.

    For the last map before the global pooling, the sum over channels of d log-odds / d channel x channel (Zhou et al.,
    2016; after an average pooling also Grad-CAM's, Selvaraju et al., 2017, before its rectification). Two inference
    passes by tiles.

    Args:
        net: in evaluation mode; its output is (1, classes).
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
    # Half of what a cell sees, around its middle, is what counts most; of a small map a quarter at most is border.
    near = (ceil(axis.extent / 4 / axis.stride) for axis in (found.rows, found.columns))
    height, width = found.values.shape[1:]
    border = min(next(near), height // 4), min(next(near), width // 4)
    return Explanation(source, found.values[0], cells, log_odds, found.adds_up, border), found.outputs[0], number


def explain_gradient(net: Accelerated | SelfExplaining, source: PixelSource, which: int | None) -> Explained:
    """Saliency of every pixel: the largest absolute `gradient` of the log-odds of a class over the channels.

    Args and returns as `explain_class`.
    """
    if isinstance(net, SelfExplaining):
        return net.explain_gradient(source, which)
    found, logits, number = gradient(net, source, which)
    return Explanation(source, found.abs().amax(0)), logits, number


def gradient(net: Accelerated, source: PixelSource, which: int | None) -> tuple[Tensor, Tensor, int]:
    """The gradient (C, H, W) of the log-odds of a class, by an image's pixels as the network sees them.

    Returns:
        The gradient, the logits (classes,), and the class; None takes it as `explain_class` does.
    """
    net.eval()
    _, height, width = source.shape
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    image = source.read(0, height, 0, width)[None].to(dtype).requires_grad_()
    with _frozen(net), torch.enable_grad():
        found = next(t for t in tree_leaves(net(image)) if isinstance(t, Tensor)).reshape(1, -1)
        heads = outputs_of(net)
        number = class_of(found, which, heads)
        (by_pixel,) = torch.autograd.grad(log_odds_of(found, number, heads)[0], image)
    return by_pixel[0], found[0].detach(), number


@contextlib.contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """No gradients of parameters, which would cost time and memory."""
    wanted = [p for p in net.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def caption(label: str, log_odds: float, number: bool = False) -> str:
    """What a picture of an explanation says of the image; of a number the number itself stands for the log-odds."""
    if number:
        return f"{label}: {log_odds:.4g}"
    return f"{label}: probability {expit(log_odds):.3f}, log-odds {log_odds:+.2f}"


def positive_class(classes: Sequence[str], heads: Outputs | None) -> int | None:
    """The number of the positive one of two classes, by its name; None of others, as `explain_class` takes it.

    Args:
        heads: what the network gives, where it is not one softmax; of several heads nothing is known.
    """
    exclusive = heads is None or heads.exclusive
    return positive_number(classes) if exclusive and len(classes) == 2 else None


def class_of(outputs: Tensor, which: int | None, heads: Outputs | None = None) -> int:
    """The class that is explained: the one asked for, else the second of two, else the most probable one.

    Of several heads it is the first one's; of labels that do not exclude each other the most probable one.

    Args:
        outputs: logits (1, classes).
        heads: what they are, where they are not those of one softmax.
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
        raise GigamorphError(f"output {which} does not exist; the network has {names}")
    return which % names


def log_odds_of(outputs: Tensor, which: int, heads: Outputs | None = None) -> Tensor:
    """Log-odds (N,) of a class against all others, of logits (N, classes); of a single output that logit."""
    if heads is not None:
        return heads.log_odds(outputs)[:, which]
    others = torch.cat([outputs[:, :which], outputs[:, which + 1 :]], 1)
    return outputs[:, which] - (torch.logsumexp(others, 1) if others.shape[1] else 0)
