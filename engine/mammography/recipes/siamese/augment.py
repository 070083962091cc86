"""Random augmentation of patches (..., C, h, w), independent for each leading index unless stated otherwise.

Random numbers come from a generator, by default PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def mirrored(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Flip up-down and left-right, each with probability 1/2, equally for all patches with the same first index."""
    for axis in (-2, -1):
        turned = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device, generator=generator) < 0.5
        x = torch.where(turned, x.flip(axis), x)
    return x


def jittered(x: Tensor, jitter: float, noise: float, generator: Generator | None = None) -> Tensor:
    """Change contrast by a share of up to `jitter`, brightness by up to `jitter` normalised units, and add noise."""
    shape = (*x.shape[:-3], 1, 1, 1)
    own: dict[str, Any] = {"device": x.device, "generator": generator}
    contrast, brightness = (1 + jitter * (2 * torch.rand(shape, **own) - 1) for _ in range(2))
    return x * contrast + (brightness - 1) + noise * torch.randn(x.shape, dtype=x.dtype, **own)


def cropped(x: Tensor, least: float, generator: Generator | None = None) -> Tensor:
    """Crop a random square of patches (N, C, h, w) with `least` to all of their area, and resize it bilinearly."""
    own: dict[str, Any] = {"device": x.device, "generator": generator}
    side = (least + (1 - least) * torch.rand(len(x), 1, **own)).sqrt()
    middle = (1 - side) * (2 * torch.rand(len(x), 2, **own) - 1)
    map_ = torch.cat([torch.diag_embed(side.expand(-1, 2)), middle[:, :, None]], 2)
    grid = F.affine_grid(map_, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x), padding_mode="border", align_corners=False)
