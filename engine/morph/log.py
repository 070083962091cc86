"""What the parent's run leaves for the check of a child: an entry per op, and in it a record per primitive step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from .lookup import Bags, Join, Rows


@dataclass(frozen=True, slots=True)
class ElementwiseRecord:
    """A function of operands position by position: `base` + the position that `join` finds is the result's vid."""

    join: Join
    base: int
    first: tuple[int, ...] = ()  # operands that were joined before the others, at their own small size
    inner: ElementwiseRecord | None = None  # the record of that


@dataclass(frozen=True, slots=True)
class RowsRecord:
    """A function of slabs along `axes`: `index` finds the parent's slab; of each output the first vid and the shape."""

    index: Rows
    outputs: tuple[tuple[int, tuple[int, ...]], ...]
    axes: list[int]


@dataclass(frozen=True, slots=True)
class StatisticRecord:
    """A mean or an extreme of slabs along `axes`: `base` + the parent's slab that `bags` finds is the vid."""

    bags: Bags
    base: int
    axes: list[int]


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """A linear op: the input's channels as rows of vids, the output's vids with the channels first."""

    inputs: Tensor
    index: Rows
    outputs: Tensor
    groups: int
    wider: bool  # whether channels are copied within their group


@dataclass(frozen=True, slots=True)
class BarrierRecord:
    """Any function of the very same values: vids that it read and vids that it gave."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    why: str


@dataclass(frozen=True, slots=True)
class AlongChannelsRecord:
    """Whether channels lie along the axes of a reduction."""

    found: bool


@dataclass(frozen=True, slots=True)
class ArgumentsRecord:
    """Plain arguments."""

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
    constants: list[Any] = field(default_factory=list)  # outputs that are no tensors
    plain: bool = False  # one output, of the operands' broadcast shape
    in_place: int | None = None  # which of the tensors among the arguments is the result
    changed: bool = False  # that tensor; `x.float()` gives x itself and leaves it as it is
    records: list[Record] = field(default_factory=list)
