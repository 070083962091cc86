"""Patches on a grid of registered pairs, stored in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ....errors import DataError
from ....files import write_atomically
from ....images.pixels import Normalize, PixelSource, to_original
from ..features import record_digest
from .config import SiameseConfig
from .pairs import Pair, open_side
from .register import breast_mask, downsampled, resample_to


def mirrored(x: Tensor) -> Tensor:
    """Flip up-down and left-right, each with probability 1/2, equally for all patches with the same first index."""
    for axis in (-2, -1):
        turned = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < 0.5
        x = torch.where(turned, x.flip(axis), x)
    return x


def jittered(x: Tensor, jitter: float, noise: float) -> Tensor:
    """Change contrast by a share of up to `jitter`, brightness by up to `jitter` normalised units, and add noise."""
    shape = (*x.shape[:-3], 1, 1, 1)
    contrast, brightness = (1 + jitter * (2 * torch.rand(shape, device=x.device) - 1) for _ in range(2))
    return x * contrast + (brightness - 1) + noise * torch.randn_like(x)


def cropped(x: Tensor, least: float) -> Tensor:
    """Crop a random square of patches (N, C, h, w) with `least` to all of their area, and resize it bilinearly."""
    side = (least + (1 - least) * torch.rand(len(x), 1, device=x.device)).sqrt()
    middle = (1 - side) * (2 * torch.rand(len(x), 2, device=x.device) - 1)
    map_ = torch.cat([torch.diag_embed(side.expand(-1, 2)), middle[:, :, None]], 2)
    grid = F.affine_grid(map_, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x), padding_mode="border", align_corners=False)


_FULL = 65535
_SMALL = 16  # blocks per side of a cell for the share of tissue


def sources_of(pair: Pair, config: SiameseConfig) -> tuple[PixelSource, PixelSource]:
    """Open both breasts of a pair in the geometry of the left one."""
    normalize = Normalize(config.mean, config.std)
    left, right = (
        open_side(record, mirror=config.mirror, normalize=normalize, channels=config.channels, voi=config.voi)
        for record in (pair.left, pair.right)
    )
    return left, resample_to(left, right, config.registration)


def cells_of(left: PixelSource, right: PixelSource, config: SiameseConfig) -> NDArray[np.int64]:
    """Return top and left (n, 2) of the grid's cells that have the required share of tissue in both breasts."""
    _, height, width = left.shape
    places = [
        (top, x)
        for top in range(0, height - config.patch + 1, config.stride)
        for x in range(0, width - config.patch + 1, config.stride)
    ]
    factor = max(1, config.patch // _SMALL)
    masks = [_mask(source, factor) for source in (left, right)]
    side = config.patch // factor
    found = [
        (top, x)
        for top, x in places
        if min(m[top // factor : top // factor + side, x // factor : x // factor + side].mean() for m in masks)
        >= config.tissue
    ]
    return np.array(found, np.int64).reshape(-1, 2)


def _mask(source: PixelSource, factor: int) -> NDArray[np.bool_]:
    """Return the breast's mask on an image averaged over blocks, the last of which may be incomplete."""
    small = downsampled(source, factor)
    _, height, width = small.shape
    mask = breast_mask(small.read(0, height, 0, width).mean(0).numpy())
    return np.pad(mask, ((0, 1), (0, 1)), mode="edge")


@dataclass(frozen=True)
class PatchFile:
    """The patches of one pair in a file."""

    pair: Pair
    path: Path
    """uint16 (n, 2, h, w), grey values from 0 to 65535, as ``.npy``."""
    cells: NDArray[np.int64]
    """(n, 2): top and left."""
    boxes: NDArray[np.float64]
    """(2, n, 4): boxes in the files of left and right; left, top, right, bottom."""
    config: SiameseConfig

    def open(self) -> NDArray[np.uint16]:
        """Return a memory map, which reads only the requested parts."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def normalised(self, pixels: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Convert pixels (..., h, w) to network inputs: float32 (..., C, h, w)."""
        mean, std = (np.array(own, np.float32)[:, None, None] for own in (self.config.mean, self.config.std))
        found = (pixels[..., None, :, :] * np.float32(1 / _FULL) - mean) / std
        return np.broadcast_to(found, (*pixels.shape[:-2], self.config.channels, *pixels.shape[-2:])).copy()


def write_patches(pair: Pair, config: SiameseConfig, folder: Path) -> PatchFile:
    """Write the patches of a pair to ``folder``, unless files with the hash of its images and settings exist.

    Raises:
        DataError: an image cannot be read, or no breast is found in it.
    """
    names = ("mean", "std", "voi", "mirror", "registration", "patch", "stride", "tissue", "channels")
    key = json.dumps(["uint16", *(getattr(config, name) for name in names)])
    digests = [record_digest(record) for record in (pair.left, pair.right)]
    path = folder / f"{hashlib.sha256(' '.join([key, *digests]).encode()).hexdigest()}.npy"
    places = path.with_suffix(".npz")
    if not places.exists() or not path.exists():
        left, right = sources_of(pair, config)
        cells = cells_of(left, right, config)
        side = config.patch
        found = np.empty((len(cells), 2, side, side), np.uint16)
        for index, (top, x) in enumerate(cells.tolist()):
            for number, source in enumerate((left, right)):
                # All channels of an image have the same grey values.
                grey = source.read(top, top + side, x, x + side)[0].numpy() * config.std[0] + config.mean[0]
                found[index, number] = np.rint(np.clip(grey, 0, 1) * _FULL)
        boxes = np.array([original_boxes(source, cells, side) for source in (left, right)]).reshape(2, -1, 4)
        write_atomically(path, lambda p: np.save(p, found), "patches")
        write_atomically(places, lambda p: np.savez(p, cells=cells, boxes=boxes), "patches")
    with np.load(places, allow_pickle=False) as stored:
        return PatchFile(pair, path, stored["cells"], stored["boxes"], config)


def original_boxes(source: PixelSource, cells: NDArray[np.int64], side: int) -> NDArray[np.float64]:
    """Return (n, 4) left, top, right, bottom of the cells in their file."""
    top, x = cells[:, 0].astype(np.float64), cells[:, 1].astype(np.float64)
    return to_original(source).boxes(np.stack([x, top, x + side, top + side], 1))


class PatchFiles:
    """Patches of files, float32 (..., C, h, w), read on access by an index, a slice or a list.

    Args:
        places: per patch, or pair of patches, the number of its file and the index in its array: a cell, or cell and
            side (0 left, 1 right).
    """

    def __init__(self, files: Sequence[PatchFile], places: Sequence[tuple[int, Any]]) -> None:
        self.files, self.places = files, list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, chosen: Any) -> Tensor:
        if isinstance(chosen, int):
            return self[[chosen]][0]
        places = self.take(chosen).places
        opened = {number: self.files[number].open() for number, _ in places}
        return torch.from_numpy(self.files[0].normalised(np.stack([opened[number][place] for number, place in places])))

    def take(self, chosen: slice | Sequence[int]) -> PatchFiles:
        """Return a selection without reading it."""
        places = self.places[chosen] if isinstance(chosen, slice) else [self.places[i] for i in chosen]
        return PatchFiles(self.files, places)


def patch_pairs(files: Sequence[PatchFile]) -> PatchFiles:
    """Return all patches of pairs in order, (n, 2, C, h, w)."""
    files = [file for file in files if len(file.cells)]
    if not files:
        raise DataError("no patch has enough tissue in both breasts; lower patch or tissue")
    return PatchFiles(files, [(number, cell) for number, file in enumerate(files) for cell in range(len(file.cells))])


def single_patches(files: Sequence[PatchFile]) -> PatchFiles:
    """Return single patches of both breasts, (n, C, h, w): of each pair all left ones, then all right ones."""
    cells = ((number, range(len(file.cells))) for number, file in enumerate(files))
    return PatchFiles(files, [(number, (cell, side)) for number, own in cells for side in range(2) for cell in own])
