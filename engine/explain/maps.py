"""Maps of where an output comes from, computed by tiles, equal to those of the whole image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..accelerate import Accelerated
from ..errors import GigamorphError
from ..images.affine import Map
from ..images.pixels import PixelSource, as_stored
from ..train.heatmap import cells_to_pixels, relative


@dataclass(frozen=True)
class Explanation:
    """A map of an image, one value a cell, with its place in the file.

    Attributes:
        source: the image that the network saw.
        values: (h, w) float; cells cover the image.
    """

    source: PixelSource
    values: Tensor

    @property
    def place(self) -> Map:
        """From cells to pixels of the file as stored: mirroring, cropping and averaging undone."""
        return cells_to_pixels(self.source, self.values.shape, stored=True)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the file."""
        return as_stored(self.source).shape[1:]

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """The map on a region of the file, float32: bilinear between the middles of cells, 0 where it does not reach.

        A map of one value a pixel comes back as it is.
        """
        return self.place.resample(self.values.float().cpu().numpy(), top, bottom, left, right)

    def relative(self) -> Explanation:
        """The positive part as it is drawn, in [0, 1]; see `heatmap.relative`."""
        return Explanation(self.source, relative(self.values))


def activation_map(net: Accelerated, source: PixelSource, output: int) -> Explanation:
    """Class activation: what each place of the last map before the global pooling adds to an output.

    sum over channels of d output / d channel x channel (Zhou et al., 2016; of an average pooling also Grad-CAM's,
    Selvaraju et al., 2017, before its rectification). Two inference passes by tiles.

    Args:
        net: its output is (1, outputs).
        output: index of the output, a logit.

    Raises:
        GigamorphError: as `Accelerated.evidence`.
    """
    net.eval()
    return Explanation(source, net.evidence(source, output=output)[0])


def gradient_map(net: Accelerated, source: PixelSource, output: int) -> Explanation:
    """Saliency of every pixel: the largest absolute gradient of an output over the channels (Simonyan et al., 2014).

    A forward and a backward by tiles. The image and its gradient are held whole in host memory, 8 bytes a value in
    float32 together; no map of the network is.

    Args:
        net: its output is (1, outputs).
        output: index of the output, a logit.

    Raises:
        GigamorphError: if the output does not exist.
    """
    net.eval()
    _, height, width = source.shape
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    image = source.read(0, height, 0, width)[None].to(dtype).requires_grad_()
    with _frozen(net), torch.enable_grad():
        found = next(t for t in tree_leaves(net(image)) if isinstance(t, Tensor)).reshape(-1)
        if not -len(found) <= output < len(found):
            raise GigamorphError(f"output {output} does not exist; the network has {len(found)}")
        (gradient,) = torch.autograd.grad(found[output], image)
    return Explanation(source, gradient[0].abs().amax(0))


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
