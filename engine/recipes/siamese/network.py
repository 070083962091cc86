"""The networks, the distance of a pair, and the loss with soft labels.

f(x) = normalised(W mean over the patch of maps(x) + b)     the embedding
D = |f(l) - f(r)|                                           sqrt(sum + eps), so that its gradient at 0 is finite
L = mean[(1 - y) D^2 + y max(0, m - D)^2]                   y in {0, 1}: Hadsell, Chopra and LeCun, 2006
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import GigamorphError
from ..features import UpTo

_EPS = 1e-8


class Embedding(nn.Module):
    """Patches (N, C, h, w) -> (N, dim) of norm 1.

    Args:
        network: any network; `layer` is the module of it whose map is averaged.
        dim: of the embedding.
        patch: side of the patches in pixels, of which a `channels`-channel one tells the size of the maps.
    """

    def __init__(self, network: nn.Module, layer: str, dim: int, channels: int, patch: int) -> None:
        super().__init__()
        self.maps = UpTo(network, layer)
        modes = [(module, module.training) for module in network.modules()]
        with torch.no_grad():
            network.eval()
            found = self.maps(torch.zeros(1, channels, patch, patch))
        for module, mode in modes:
            module.training = mode
        if not isinstance(found, Tensor) or found.ndim != 4:
            raise GigamorphError(f"layer {layer!r} gives no map (N, C, h, w); name one that does")
        self.cells = tuple(found.shape[2:])
        """Height and width of a patch's map."""
        self.project = nn.Linear(found.shape[1], dim)

    def features(self, x: Tensor) -> Tensor:
        """(N, channels): the average of the maps, which downstream classifiers take."""
        return self.maps(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        with unrounded(x):
            return F.normalize(self.project(x.to(self.project.weight)), dim=1)


def unrounded(x: Tensor) -> torch.autocast:
    """Without autocast: distances and cosines of what is alike are lost in bfloat16's rounding."""
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """What autocast has made of lower precision in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean (N,), of embeddings (N, dim)."""
    return ((a - b).square().sum(1) + _EPS).sqrt()


def soft_contrastive(d: Tensor, y: Tensor, margin: float = 1.0) -> Tensor:
    """The mean loss of distances (N,) with labels (N,), to which no gradient goes."""
    y = y.detach()
    return ((1 - y) * d.square() + y * F.relu(margin - d).square()).mean()


class AsymmetryMap(nn.Module):
    """Two registered breasts, stacked as channels (N, 2 C, H, W), -> distances (N, 1, h, w) of their cells.

    A cell is an average over as many places of the maps as a patch has, `step` places further each time. Convolutions
    see what is around a cell where a patch has a border: the distance is that of the patches up to this.
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
