"""Layout of copies: how often each channel is copied, and the resulting index along every parameter axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .parent_run import Axis, ParentRun

Copies = dict[int, tuple[int, int]]  # class (root atom) -> copies and new (free) ones of each of its channels


@dataclass
class ParameterMap:
    """Map from one tensor of the parent to the child's tensor."""

    axis: int | None = None  # axis along which whole slices are copied
    parents: Tensor | None = None  # the parent's slice that each slice copies
    free: Tensor | None = None  # mask of the slices that are new, and random in a weight
    columns_axis: int | None = None  # axis along which a linear weight is split
    columns: Tensor | None = None  # the parent's column of each column; FREE: zero

    def shape(self, old: Sequence[int]) -> tuple[int, ...]:
        """Return the child's shape for the parent's shape `old`."""
        size = list(old)
        for axis, index in ((self.axis, self.parents), (self.columns_axis, self.columns)):
            if axis is not None and index is not None:
                size[axis] = len(index)
        return tuple(size)

    def changes(self, old: Sequence[int]) -> bool:
        """Return whether the map differs from the identity on that shape."""
        return any(
            axis is not None and index is not None and is_moved(index, old[axis])
            for axis, index in ((self.axis, self.parents), (self.columns_axis, self.columns))
        )


@dataclass
class CopyPlan:
    """Copies per class, laid out along the parameter axes.

    Attributes:
        counts: (2, atoms); copies and new ones of each channel, at the index of the class's root.
        parents: for each axis, the parent's index of each of the child's indices.
        free: for each axis, the mask of indices that are new.
    """

    counts: np.ndarray
    parents: dict[Axis, Tensor] = field(default_factory=dict)
    free: dict[Axis, Tensor] = field(default_factory=dict)

    def rows(self, name: str, axis: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the parent's index of each index along an axis of old length `count`, and the mask of new ones."""
        if (name, axis) in self.parents:
            return self.parents[name, axis], self.free[name, axis]
        return torch.arange(count), torch.zeros(count, dtype=torch.bool)


def make_plan(found: ParentRun, copies: Copies) -> CopyPlan:
    """Lay out the copies: each maximal run of one class without borders is repeated as a block, new channels last."""
    counts = np.zeros((2, found.atoms.size), dtype=np.int64)
    counts[0] = 1
    for root, copied_and_new in copies.items():
        counts[:, root] = copied_and_new
    plan = CopyPlan(counts)
    borders = found.borders.find()
    known: dict[bytes, tuple[Tensor, Tensor]] = {}  # e.g. all vectors of a norm have the same layout
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
    """Return whether an index differs from 0, 1, ..., size - 1."""
    return len(index) != size or not torch.equal(index, torch.arange(size))


def _lay_out(roots: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the parent's index of each new index, and the mask of free ones, for an axis with these classes."""
    starts = np.flatnonzero(np.concatenate([[True], (roots[1:] != roots[:-1]) | ends[:-1]]))
    lengths = np.diff(np.append(starts, len(roots)))
    copied, new = counts[:, roots[starts]]
    total = copied + new
    run = np.repeat(np.arange(len(starts)), lengths * total)  # run of each new index
    first = np.repeat(np.cumsum(lengths * total) - lengths * total, lengths * total)
    within = np.arange(len(run)) - first
    parents = starts[run] + within % lengths[run]
    return torch.from_numpy(parents), torch.from_numpy(within // lengths[run] >= copied[run])
