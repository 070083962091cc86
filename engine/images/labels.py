"""Labels of a dense loss, read by region like images, and the loss on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import GigamorphError
from ..torch_private import TreeSpec, tree_unflatten
from .batches import PixelBatch
from .pixels import PixelSource

Criterion = Callable[[Any, Any], Any]


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
