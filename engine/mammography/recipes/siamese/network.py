"""The networks, the distance of a pair, and the loss with soft labels.

f(x) = normalised(W mean over the patch of maps(x) + b)     the embedding
D = |f(l) - f(r)|                                           sqrt(sum + eps), so that its gradient at 0 is finite
L = mean[(1 - y) D^2 + y max(0, m - D)^2]                   y in {0, 1}: Hadsell, Chopra and LeCun, 2006
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..features import UpTo, shape_of_maps

_EPS = 1e-8


class Embedding(nn.Module):
    """Patches (N, C, h, w) -> (N, dim) of norm 1.

    Args:
        network: any network.
        layer: the module whose map is averaged.
        dim: size of the embedding.
        channels, patch: of the patches; patch is their side in pixels, which determines the size of the maps.
    """

    def __init__(self, network: nn.Module, layer: str, dim: int, channels: int, patch: int) -> None:
        super().__init__()
        self.maps = UpTo(network, layer)
        _, width, *cells = shape_of_maps(self.maps, channels, patch)
        self.cells = tuple(cells)
        """Height and width of a patch's map."""
        self.project = nn.Linear(width, dim)

    def features(self, x: Tensor) -> Tensor:
        """Return (N, channels): the mean of the maps, the input of downstream classifiers."""
        return self.maps(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        with without_autocast(x):
            return F.normalize(self.project(x.to(self.project.weight)), dim=1)


def without_autocast(x: Tensor) -> torch.autocast:
    """Disable autocast: distances and cosines of similar inputs would be lost in bfloat16's rounding."""
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert tensors of lower precision, from autocast, to float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances (N,) of embeddings (N, dim)."""
    return ((a - b).square().sum(1) + _EPS).sqrt()


def soft_contrastive(d: Tensor, y: Tensor, margin: float = 1.0) -> Tensor:
    """Return the mean loss of distances (N,) with labels (N,), which get no gradient."""
    y = y.detach()
    return ((1 - y) * d.square() + y * F.relu(margin - d).square()).mean()


class AsymmetryMap(nn.Module):
    """Two registered breasts, stacked as channels (N, 2 C, H, W) -> distances (N, 1, h, w) of their cells.

    A cell averages as many locations of the maps as a patch has, with a stride of `step`. Convolutions see the
    surroundings of a cell instead of a patch's border; apart from this, the distance is that of the patches.
    """

    def __init__(self, embedding: Embedding, step: int | None = None) -> None:
        super().__init__()
        self.embedding, self.step = embedding, step or max(1, embedding.cells[0] // 2)

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        first, second = self._cells(x[:, :half]), self._cells(x[:, half:])
        return ((first - second).square().sum(1, keepdim=True) + _EPS).sqrt()

    def _cells(self, x: Tensor) -> Tensor:
        own = self.embedding
        cells = F.avg_pool2d(own.maps(x), own.cells, self.step)
        cells = F.conv2d(cells, own.project.weight[:, :, None, None], own.project.bias)
        return cells / (cells.square().sum(1, keepdim=True) + 1e-24).sqrt()
