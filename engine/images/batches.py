"""Batches of images of equal size: joint reading of sources, and conversion of users' inputs to batches; labels.

Inputs are tensors and pixel sources, single or in lists. Labels of a dense loss are read by region like images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError
from ..torch_private import TreeSpec, tree_unflatten
from .pixels import ImageSource, PixelSource
from .stored import integer_dtype

Criterion = Callable[[Any, Any], Any]


class PixelBatch:
    """N pixel sources of equal shape, images or volumes, read together."""

    def __init__(self, sources: Sequence[PixelSource]) -> None:
        if not sources:
            raise DataError("a batch needs at least one image")
        first = sources[0]
        for source in sources:
            if tuple(source.shape) != tuple(first.shape):
                raise DataError(
                    f"{source.name}: shape {tuple(source.shape)} differs from {tuple(first.shape)} of {first.name} "
                    "in the same batch; use batch size 1 or images of one size"
                )
        self.sources = list(sources)

    @property
    def shape(self) -> tuple[int, ...]:
        """(images, channels, height, width); of volumes, (volumes, channels, slices, height, width)."""
        return (len(self.sources), *self.sources[0].shape)

    @property
    def names(self) -> list[str]:
        """The names of the images for messages."""
        return [source.name for source in self.sources]

    def __len__(self) -> int:
        return len(self.sources)

    def __repr__(self) -> str:
        return f"PixelBatch(shape={self.shape})"

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """A region of all, float32 (images, ..., bottom - top, right - left); errors as in `PixelSource.read`."""
        return torch.stack([source.read(top, bottom, left, right) for source in self.sources])


class StoredBatch:
    """A batch whose tiles are read as stored values and converted to the network's input on the device.

    This uploads half the bytes for 16-bit images, a quarter for 8-bit images, and saves the conversion on the host.
    """

    def __init__(self, sources: Sequence[ImageSource], shape: tuple[int, ...]) -> None:
        self.sources, self.shape = sources, shape

    @classmethod
    def of(cls, batch: PixelBatch) -> StoredBatch | None:
        """The same batch if its sources support `develop` with equal stored dtypes and channels; otherwise None."""
        sources = [s for s in batch.sources if isinstance(s, ImageSource) and s.can_develop]
        alike = len({(s.stored.shape[0], integer_dtype(s.stored.dtype)) for s in sources}) == 1
        return cls(sources, batch.shape) if alike and len(sources) == len(batch) else None

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Stored values of a region, uint8 or uint16 (images, stored channels, bottom - top, right - left)."""
        return torch.stack([source.read_stored(top, bottom, left, right) for source in self.sources])

    def develop(self, stored: Tensor) -> Tensor:
        """The result of `PixelBatch.read`, float32 (images, channels, bottom - top, right - left)."""
        return torch.stack([source.develop(own) for source, own in zip(self.sources, stored, strict=True)])


def is_batch(x: Any) -> bool:
    """Whether a single argument is an image batch: dicts and named tuples are inputs of the network itself."""
    return not isinstance(x, dict) and not (isinstance(x, tuple) and type(x) is not tuple)


def as_batches(x: Tensor | PixelSource | PixelBatch | Sequence[Tensor | PixelSource]) -> list[Tensor | PixelBatch]:
    """Convert a network's input to batches with images of equal size: one batch, or several for a list of sizes.

    Args:
        x: a tensor or `PixelBatch`, which is a batch already; a source; or a list of tensors (C, H, W) or (N, C, H, W)
            of one dtype and of sources. Tensors of equal size are concatenated.

    Raises:
        DataError: for other inputs, with their index in the list.
    """
    if not isinstance(x, list | tuple):
        return [_one_batch(x, "")]
    if not x:
        raise DataError("a batch needs at least one image")
    parts = [_one_batch(item, f" as item {number}") for number, item in enumerate(x)]
    dtypes = {str(part.dtype) for part in parts if isinstance(part, Tensor)}
    if len(dtypes) > 1:
        raise DataError(f"the images of a list have the dtypes {', '.join(sorted(dtypes))}; pass one dtype")
    if len({tuple(part.shape[1:]) for part in parts}) > 1:
        return parts
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        return [PixelBatch([source for part in parts for source in part.sources])]  # pyright: ignore
    together = len(tensors) == len(parts) and len({tensor.device for tensor in tensors}) == 1
    return [tensors[0] if len(tensors) == 1 else torch.cat(tensors)] if together else parts


def as_batch(x: Tensor | PixelSource | PixelBatch | Sequence[Tensor | PixelSource]) -> Tensor | PixelBatch:
    """Convert a network's input to a single batch, as `as_batches` does.

    Raises:
        DataError: also for images of several sizes.
    """
    first, *others = as_batches(x)
    if others:
        shapes = ", ".join(str(tuple(part.shape[1:])) for part in (first, *others))
        raise DataError(f"images of one batch differ in size or kind: {shapes}; pass images of one size")
    return first


def _one_batch(item: Any, where: str) -> Tensor | PixelBatch:
    if isinstance(item, PixelBatch):
        return item
    if isinstance(item, PixelSource):
        return PixelBatch([item])
    if not isinstance(item, Tensor):
        raise DataError(
            f"expected a tensor, a pixel source or a list of them, got {type(item).__name__}{where}; "
            "open files with open_pixels, and pass the contents of an object as arguments or in a dict"
        )
    if where and item.dim() not in (3, 4):
        raise DataError(f"the image{where} has shape {tuple(item.shape)}; it must be (C, H, W) or (N, C, H, W)")
    return item[None] if where and item.dim() == 3 else item


@dataclass
class LabelSource:
    """Labels as a source of a stage: a tensor, or a source that is read by region."""

    values: Any
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.values, PixelSource):
            self.values = PixelBatch([self.values])
        if not hasattr(self.values, "shape"):
            raise GigamorphError(
                f"labels must be tensors, arrays or sources with shape and read(), not {type(self.values).__name__}"
            )
        self.shape = tuple(self.values.shape)
        if len(self.shape) < 2 or not all(self.shape):
            raise GigamorphError(f"labels of shape {self.shape} must have two non-empty image axes at the end")
        self.dtype = self.values.dtype if isinstance(self.values, Tensor) else self.read(0, 1, 0, 1).dtype

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        reader = getattr(self.values, "read", None)
        part = reader(top, bottom, left, right) if reader else self.values[..., top:bottom, left:right]
        return part if isinstance(part, Tensor) else _tensor(part)


def _tensor(values: Any) -> Tensor:
    """An array as a tensor, integers as int64."""
    array = np.asarray(values)
    if array.dtype.kind in "iu":
        array = array.astype(np.int64)
    if array.dtype.kind not in "ifb":
        raise GigamorphError(f"labels must be numbers, not {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


# Partials of functions instead of closures, so that a recording finds the dependencies of the criterion.
def with_loss(network: nn.Module, criterion: Criterion, structure: TreeSpec, image: Tensor, *labels: Tensor) -> Any:
    """The loss of a network's outputs for an image, with flattened labels of a tree structure."""
    return loss_of(criterion, structure, network(image), *labels)


def loss_of(criterion: Criterion, structure: TreeSpec, outputs: Any, *labels: Tensor) -> Any:
    """The loss of given outputs, with flattened labels of a tree structure."""
    return criterion(outputs, tree_unflatten(list(labels), structure))
