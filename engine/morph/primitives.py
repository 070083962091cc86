"""The primitive steps that every op is made of; the parent's run and the check of a child do each in their own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .labels import Label

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LinearCall:
    """A linear op of the stored weight `name` on channel `axis` of its input; `shape` is the parent's output's."""

    name: str
    axis: int
    transposed: bool
    groups: int
    shape: Shape

    @property
    def axes(self) -> tuple[int, int]:
        """The weight's axes of output and of input channels, as in a convolution of one group."""
        return (1, 0) if self.transposed else (0, 1)


class Primitives(ABC):
    """What becomes of labels in each primitive step."""

    @abstractmethod
    def need(self, tensor: Tensor) -> Label:
        """The tensor's label, for a constant by its values."""

    @abstractmethod
    def stored_name(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer."""

    @abstractmethod
    def matrix(self, tensor: Tensor) -> tuple[str, bool] | None:
        """The name of a stored matrix, and whether the tensor is its transpose; None for any other tensor."""

    @abstractmethod
    def constant_vid(self, value: float) -> int:
        """The vid of a constant."""

    @abstractmethod
    def elementwise(self, labels: list[Label]) -> Label:
        """A function of the elements at the same broadcast position."""

    @abstractmethod
    def rows(self, label: Label, axes: list[int], outputs: list[Shape], keeps: bool) -> list[Label]:
        """A function of each slab along `axes`; `keeps`: the output has as many axes as the input."""

    @abstractmethod
    def statistic(self, label: Label, axes: list[int], extreme: bool) -> Label:
        """A mean-like function (or extreme) of the multiset of each slab along `axes`; they are kept with size 1."""

    @abstractmethod
    def places(self, label: Label, axes: list[int], shape: Shape) -> Label:
        """Where in each slab along `axes` something is found: other numbers as soon as the slab is another one."""

    @abstractmethod
    def linear(self, label: Label, call: LinearCall) -> Label:
        """A linear op on channels."""

    @abstractmethod
    def barrier(self, labels: list[Label], outputs: list[Shape], why: str) -> list[Label]:
        """Any function at all of the very same values."""

    @abstractmethod
    def along_channels(self, label: Label, axes: list[int]) -> bool:
        """Whether channels of the parent lie along these axes."""

    @abstractmethod
    def agree(self, values: list[Any]) -> None:
        """Plain arguments that must be the same in both runs."""

    @abstractmethod
    def size(self, what: str, given: int, wanted: int, label: Label, axis: int) -> None:
        """An argument that goes with the number of channels on an axis, and what it has to be at this width."""

    @abstractmethod
    def group_count(self, channels: int, groups: int) -> int:
        """Number of groups of a group norm at this width."""

    @abstractmethod
    def pick(self, name: str, label: Label, results: list[Label]) -> None:
        """After data movement that picks by fixed indices."""
