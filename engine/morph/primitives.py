"""Interface of the primitive steps that make up every op; the parent's run and the check of a child implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .labels import Label

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LinearCall:
    """A linear op with the stored weight `name` on `axis` of its input; `shape` is the parent's output shape."""

    name: str
    axis: int
    transposed: bool
    groups: int
    shape: Shape

    @property
    def axes(self) -> tuple[int, int]:
        """Axes of output and input channels of the weight, as in a convolution of one group."""
        return (1, 0) if self.transposed else (0, 1)


class Primitives(ABC):
    """Primitive steps on labels."""

    @abstractmethod
    def need(self, tensor: Tensor) -> Label:
        """Return the tensor's label; for a constant it is derived from the values."""

    @abstractmethod
    def stored_name(self, tensor: Tensor) -> str | None:
        """Return the name of a parameter or buffer; None for other tensors."""

    @abstractmethod
    def matrix(self, tensor: Tensor) -> tuple[str, bool] | None:
        """Return the name of a stored matrix, and whether the tensor is its transpose; None for other tensors."""

    @abstractmethod
    def constant_vid(self, value: float) -> int:
        """Return the vid of a constant."""

    @abstractmethod
    def elementwise(self, labels: list[Label]) -> Label:
        """Apply a function of the elements at the same broadcast position."""

    @abstractmethod
    def rows(self, label: Label, axes: list[int], outputs: list[Shape], keeps: bool) -> list[Label]:
        """Apply a function of each slab along `axes`; with `keeps` the output has as many axes as the input."""

    @abstractmethod
    def statistic(self, label: Label, axes: list[int], extreme: bool) -> Label:
        """Apply a mean-like function (or extreme) of the multiset of each slab along `axes`, which get size 1."""

    @abstractmethod
    def indices(self, label: Label, axes: list[int], shape: Shape) -> Label:
        """Label indices into each slab along `axes`, e.g. of its maximum; they differ as soon as the slab differs."""

    @abstractmethod
    def linear(self, label: Label, call: LinearCall) -> Label:
        """Apply a linear op to channels."""

    @abstractmethod
    def barrier(self, labels: list[Label], outputs: list[Shape], why: str) -> list[Label]:
        """Apply an unknown function, which needs unchanged values."""

    @abstractmethod
    def along_channels(self, label: Label, axes: list[int]) -> bool:
        """Return whether these axes contain a channel axis of the parent."""

    @abstractmethod
    def agree(self, values: list[Any]) -> None:
        """Record or compare plain arguments, which must be the same in both runs."""

    @abstractmethod
    def size(self, what: str, given: int, wanted: int, label: Label, axis: int) -> None:
        """Handle an argument that depends on the number of channels on an axis; `wanted` is its value at this width."""

    @abstractmethod
    def group_count(self, channels: int, groups: int) -> int:
        """Return the number of groups of a group norm at this width."""

    @abstractmethod
    def pick(self, name: str, label: Label, results: list[Label]) -> None:
        """Handle a data movement that picks by fixed indices."""
