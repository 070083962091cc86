"""Patches of phantom mammograms for synthetic tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..phantom import PhantomImage
from ..phantom.image import LESIONS, Kind

CLASSES: tuple[str, ...] = ("normal", *LESIONS)
_HEIGHT, _WIDTH, _SHIFT = 256, 192, 6


def phantom_patches(
    count: int, side: int, seed: Sequence[int], lesions: Sequence[Kind] = LESIONS
) -> tuple[Tensor, Tensor]:
    """Return patches float32 (count, 1, side, side) in [0, 1], and classes int64 (count,): 0 normal, then `lesions`.

    Each patch is from its own phantom; classes alternate. A lesion patch is centred on the lesion up to 6 pixels; a
    normal patch is where a lesion would have been.
    """
    classes = 1 + len(lesions)
    patches = np.empty((count, 1, side, side), np.float32)
    for index in range(count):
        own = (*seed, index)
        normal = index % classes == 0
        kind = lesions[(index // classes if normal else index % classes - 1) % len(lesions)]
        image = PhantomImage(_HEIGHT, _WIDTH, seed=own, lesions=(kind,))
        top, bottom, left, right = image.lesions[0].box
        if normal:
            image = PhantomImage(_HEIGHT, _WIDTH, seed=own)
        shift = np.random.default_rng([*own, 1]).integers(-_SHIFT, _SHIFT + 1, 2)
        y = int(np.clip((top + bottom - side) // 2 + shift[0], 0, _HEIGHT - side))
        x = int(np.clip((left + right - side) // 2 + shift[1], 0, _WIDTH - side))
        patches[index, 0] = image.read(y, y + side, x, x + side) / np.float32(4095)
    return torch.from_numpy(patches), torch.arange(count) % classes
