"""Interface of the primitive steps that make up every op, and the log of the parent's run.

The parent's run and the check of a child implement the interface. The log has an entry per op, with a record per step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..torch_private import TreeSpec
from .labels import Label
from .lookup import Bags, Join, SlabRows

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


class Primitives(Protocol):
    """Primitive steps on labels."""

    # Return the tensor's label; for a constant it is derived from the values.
    def need(self, tensor: Tensor) -> Label: ...

    # Return the name of a parameter or buffer; None for other tensors.
    def stored_name(self, tensor: Tensor) -> str | None: ...

    # Return the name of a stored matrix, and whether the tensor is its transpose; None for other tensors.
    def matrix(self, tensor: Tensor) -> tuple[str, bool] | None: ...

    # Return the vid of a constant.
    def constant_vid(self, value: float) -> int: ...

    # Apply a function of the elements at the same broadcast position.
    def elementwise(self, labels: list[Label]) -> Label: ...

    # Apply a function of each slab along `axes`; with `keeps` the output has as many axes as the input.
    def rows(self, label: Label, axes: list[int], outputs: list[Shape], keeps: bool) -> list[Label]: ...

    # Apply a mean-like function (or extreme) of the multiset of each slab along `axes`, which get size 1.
    def statistic(self, label: Label, axes: list[int], extreme: bool) -> Label: ...

    # Label indices into each slab along `axes`, e.g. of its maximum; they differ as soon as the slab differs.
    def indices(self, label: Label, axes: list[int], shape: Shape) -> Label: ...

    # Apply a linear op to channels.
    def linear(self, label: Label, call: LinearCall) -> Label: ...

    # Apply an unknown function, which needs unchanged values.
    def barrier(self, labels: list[Label], outputs: list[Shape], why: str) -> list[Label]: ...

    # Return whether these axes contain a channel axis of the parent.
    def along_channels(self, label: Label, axes: list[int]) -> bool: ...

    # Record or compare plain arguments, which must be the same in both runs.
    def agree(self, values: list[Any]) -> None: ...

    # Handle an argument that depends on the number of channels on an axis; `wanted` is its value at this width.
    def size(self, what: str, given: int, wanted: int, label: Label, axis: int) -> None: ...

    # Return the number of groups of a group norm at this width.
    def group_count(self, channels: int, groups: int) -> int: ...

    # Handle a data movement that picks by fixed indices.
    def pick(self, name: str, label: Label, results: list[Label]) -> None: ...

    # Create the label of a parameter or buffer at its first read.
    def parameter_label(self, name: str, tensor: Tensor) -> Label: ...

    # Begin an op, and return its entry in the log.
    def begin(self, name: str, scalars: list[Any]) -> Entry: ...


@dataclass(frozen=True, slots=True)
class ElementwiseRecord:
    """An elementwise function: the vid of a result is `base` + the position that `join` finds."""

    join: Join
    base: int
    first: tuple[int, ...] = ()  # small operands that were joined before the others, at their own size
    inner: ElementwiseRecord | None = None  # the record of that first join


@dataclass(frozen=True, slots=True)
class RowsRecord:
    """A function of slabs along `axes`: `index` finds the parent's slab; `outputs` are pairs of first vid and shape.

    The index of a mean or an extreme compares the values in a slab, not their order.
    """

    index: SlabRows | Bags
    outputs: tuple[tuple[int, tuple[int, ...]], ...]
    axes: list[int]


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """A linear op: input channels as rows of vids, and the vids of the output with the channels first."""

    index: SlabRows
    outputs: Tensor
    groups: int
    wider: bool  # whether channels are copied within their group


@dataclass(frozen=True, slots=True)
class BarrierRecord:
    """An unknown function, which needs unchanged values: the vids that it read and those that it returned."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    why: str


@dataclass(frozen=True, slots=True)
class ValueRecord:
    """A plain value: arguments of an op, whether axes contain channels, or the channels in each group of a norm."""

    value: Any


Record = ElementwiseRecord | RowsRecord | LinearRecord | BarrierRecord | ValueRecord


@dataclass(slots=True)
class Entry:
    """One op of the parent's log."""

    name: str
    scalars: list[Any]
    where: str
    structure: TreeSpec | None = None
    outputs: list[tuple[tuple[int, ...], torch.dtype] | None] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)  # outputs that are not tensors
    plain: bool = False  # whether it has one output of the operands' broadcast shape
    in_place: int | None = None  # index of the argument tensor that is the result
    changed: bool = False  # whether that tensor changed; `x.float()` may return x itself without a change
    records: list[Record] = field(default_factory=list)
