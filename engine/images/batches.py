"""What users give a network, tensors and pixel sources alone or in lists, as batches of images of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .pixels import PixelBatch, PixelSource


def as_batches(x: Tensor | PixelSource | PixelBatch | Sequence[Tensor | PixelSource]) -> list[Tensor | PixelBatch]:
    """What a network takes as batches whose images are of one size each; one batch, unless a list has several sizes.

    Args:
        x: a tensor or `PixelBatch`, which is one already; a source; or a list of tensors (C, H, W) or (N, C, H, W) of
            one dtype and of sources. Tensors of equal size are concatenated.

    Raises:
        DataError: naming what is none of these, and its place in the list.
    """
    if not isinstance(x, list | tuple):
        return [_one_batch(x, "")]
    if not x:
        raise DataError("a batch needs at least one image")
    parts = [_one_batch(item, f" as item {number}") for number, item in enumerate(x)]
    dtypes = {str(part.dtype) for part in parts if isinstance(part, Tensor)}
    if len(dtypes) > 1:
        raise DataError(f"the images of a list have the dtypes {', '.join(sorted(dtypes))}; give one dtype")
    if len({tuple(part.shape[1:]) for part in parts}) > 1:
        return parts
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        return [PixelBatch([source for part in parts for source in part.sources])]  # pyright: ignore
    together = len(tensors) == len(parts) and len({tensor.device for tensor in tensors}) == 1
    return [tensors[0] if len(tensors) == 1 else torch.cat(tensors)] if together else parts


def as_batch(x: Tensor | PixelSource | PixelBatch | Sequence[Tensor | PixelSource]) -> Tensor | PixelBatch:
    """`as_batches` where there can be one only.

    Raises:
        DataError: also for images of several sizes.
    """
    first, *others = as_batches(x)
    if others:
        shapes = ", ".join(str(tuple(part.shape[1:])) for part in (first, *others))
        raise DataError(f"images of one batch differ in size or kind: {shapes}; give images of one size")
    return first


def _one_batch(item: Any, where: str) -> Tensor | PixelBatch:
    if isinstance(item, PixelBatch):
        return item
    if isinstance(item, PixelSource):
        return PixelBatch([item])
    if not isinstance(item, Tensor):
        raise DataError(
            f"expected a tensor, a pixel source or a list of them, got {type(item).__name__}{where}; "
            "use open_pixels first"
        )
    if where and item.dim() not in (3, 4):
        raise DataError(f"the image{where} is a tensor of shape {tuple(item.shape)}, not (C, H, W) or (N, C, H, W)")
    return item[None] if where and item.dim() == 3 else item
