"""Where copies go: how often each channel is copied, and what that makes of every parameter axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .parent_run import Axis, ParentRun

Copies = dict[int, tuple[int, int]]  # class (root atom) -> copies of each of its channels, and free ones


@dataclass
class ParameterMap:
    """How one tensor of the child is made of the parent's."""

    axis: int | None = None  # along which whole slices are copied
    parents: Tensor | None = None  # parent's slice of each slice
    free: Tensor | None = None  # which of them are new and random instead (of a weight)
    columns_axis: int | None = None  # along which a linear weight is split
    columns: Tensor | None = None  # parent's column of each column; FREE: zero

    def shape(self, old: Sequence[int]) -> tuple[int, ...]:
        """The child's shape for the parent's."""
        size = list(old)
        for axis, index in ((self.axis, self.parents), (self.columns_axis, self.columns)):
            if axis is not None and index is not None:
                size[axis] = len(index)
        return tuple(size)

    def changes(self, old: Sequence[int]) -> bool:
        """Whether it is another map than the identity of that shape."""
        return any(
            axis is not None and index is not None and is_moved(index, old[axis])
            for axis, index in ((self.axis, self.parents), (self.columns_axis, self.columns))
        )


@dataclass
class Plan:
    """Copies per class, spread over the parameter axes.

    Attributes:
        counts: copies of each channel of the class of that root, and new ones, (2, atoms).
        parents: parent's index of each new one along an axis.
        free: which of them are new.
    """

    counts: np.ndarray
    parents: dict[Axis, Tensor] = field(default_factory=dict)
    free: dict[Axis, Tensor] = field(default_factory=dict)

    def rows(self, name: str, axis: int, count: int) -> tuple[Tensor, Tensor]:
        """Parent's index of each new one of `count` along an axis, and which are new."""
        if (name, axis) in self.parents:
            return self.parents[name, axis], self.free[name, axis]
        return torch.arange(count), torch.zeros(count, dtype=torch.bool)


def make_plan(found: ParentRun, copies: Copies) -> Plan:
    """Order rule: maximal runs of equal class, without borders, are tiled as wholes, the free ones last."""
    counts = np.zeros((2, found.atoms.size), dtype=np.int64)
    counts[0] = 1
    for root, kept_and_new in copies.items():
        counts[:, root] = kept_and_new
    plan = Plan(counts)
    borders = found.borders.find()
    known: dict[bytes, tuple[Tensor, Tensor]] = {}  # the vectors of a norm are laid out alike
    for axis, atoms in found.axes.items():
        roots = found.atoms.roots(atoms)
        ends = borders[atoms]
        key = roots.tobytes() + ends.tobytes()
        if key not in known:
            known[key] = _lay_out(roots, ends, counts)
        parents, free = known[key]
        if is_moved(parents, len(roots)) or bool(free.any()):
            plan.parents[axis], plan.free[axis] = parents, free
    return plan


def is_moved(index: Tensor, size: int) -> bool:
    """Whether an index is another than 0, 1, ..., size - 1."""
    return len(index) != size or not torch.equal(index, torch.arange(size))


def _lay_out(roots: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Parent's index of each new one, and which of them are free, for an axis with these classes and borders."""
    starts = np.flatnonzero(np.concatenate([[True], (roots[1:] != roots[:-1]) | ends[:-1]]))
    lengths = np.diff(np.append(starts, len(roots)))
    kept, new = counts[:, roots[starts]]
    total = kept + new
    run = np.repeat(np.arange(len(starts)), lengths * total)  # run of each new index
    first = np.repeat(np.cumsum(lengths * total) - lengths * total, lengths * total)
    within = np.arange(len(run)) - first
    parents = starts[run] + within % lengths[run]
    return torch.from_numpy(parents), torch.from_numpy(within // lengths[run] >= kept[run])
