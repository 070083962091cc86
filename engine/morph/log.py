"""Log of the parent's run for the check of a child: one entry per op, with one record per primitive step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..torch_private import TreeSpec
from .lookup import Bags, Join, Rows


@dataclass(frozen=True, slots=True)
class ElementwiseRecord:
    """An elementwise function: the vid of a result is `base` + the position that `join` finds."""

    join: Join
    base: int
    first: tuple[int, ...] = ()  # small operands that were joined before the others, at their own size
    inner: ElementwiseRecord | None = None  # the record of that first join


@dataclass(frozen=True, slots=True)
class RowsRecord:
    """A function of slabs along `axes`: `index` finds the parent's slab; `outputs` are pairs of first vid and shape."""

    index: Rows
    outputs: tuple[tuple[int, tuple[int, ...]], ...]
    axes: list[int]


@dataclass(frozen=True, slots=True)
class StatisticRecord:
    """A mean or an extreme of slabs along `axes`: the vid is `base` + the parent's slab that `bags` finds."""

    bags: Bags
    base: int
    axes: list[int]


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """A linear op: input channels as rows of vids, and the vids of the output with the channels first."""

    inputs: Tensor
    index: Rows
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
class AlongChannelsRecord:
    """Whether the axes of a reduction contain a channel axis."""

    found: bool


@dataclass(frozen=True, slots=True)
class ArgumentsRecord:
    """Plain arguments of an op."""

    values: list[Any]


@dataclass(frozen=True, slots=True)
class GroupWidthRecord:
    """Channels in each group of a group norm."""

    width: int


Record = (
    ElementwiseRecord
    | RowsRecord
    | StatisticRecord
    | LinearRecord
    | BarrierRecord
    | AlongChannelsRecord
    | ArgumentsRecord
    | GroupWidthRecord
)


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
