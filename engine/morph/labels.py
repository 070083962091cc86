"""Labels of a tensor's elements: a value number (vid) each, and for the parent the atom, its channel on some axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Label:
    """Of one tensor: a value number per element and, in the parent, an atom per element (same shape)."""

    vids: Tensor
    atoms: Tensor | None
    version: int = 0
    parameter: str | None = None  # name, if the tensor is the parameter or buffer itself

    def reshape(self, shape: Sequence[int]) -> Label:
        """The elements in another shape."""
        return Label(self.vids.reshape(shape), None if self.atoms is None else self.atoms.reshape(shape))

    def on_axis(self, axis: int, ndim: int) -> Label:
        """A vector as a tensor of `ndim` axes, along one of them."""
        return self.reshape([-1 if a == axis else 1 for a in range(ndim)])

    def as_channels(self, ndim: int) -> Label:
        """A vector (C) as (1, C, 1, ...); a scalar stays one."""
        if self.vids.ndim == 0:
            return self
        return self.on_axis(1 if ndim > 1 else 0, max(ndim, 1))

    def spread_over(self, like: Label) -> Label:
        """A statistic of `like`, repeated over what it was taken from; it belongs to the same channels."""
        return Label(self.vids.expand(like.vids.shape), like.atoms)

    def slabs(self, axes: list[int]) -> Tensor:
        """Vids as rows (K, M), one per slab along `axes`."""
        kept = self.others(axes)
        count = math.prod(self.vids.shape[a] for a in kept)
        return self.vids.permute(*kept, *axes).reshape(count, -1)

    def others(self, axes: list[int]) -> list[int]:
        """All axes but these."""
        return [a for a in range(self.vids.ndim) if a not in axes]


def no_atoms(shape: Sequence[int]) -> Tensor:
    """Atoms of values that belong to no channel."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def known_atoms(label: Label) -> Tensor:
    """The atoms, which all labels of the parent have."""
    assert label.atoms is not None
    return label.atoms


def compact(atoms: Tensor) -> Tensor:
    """Without the repeats of expanded axes: those get size 1."""
    for axis in range(atoms.ndim):
        if atoms.stride(axis) == 0 and atoms.shape[axis] > 1:
            atoms = atoms.narrow(axis, 0, 1)
    return atoms


def essential(atoms: Tensor) -> Tensor:
    """Without the axes along which nothing changes: those get size 1."""
    atoms = compact(atoms)
    for axis in range(atoms.ndim):
        if atoms.shape[axis] > 1 and bool((atoms == atoms.narrow(axis, 0, 1)).all()):
            atoms = atoms.narrow(axis, 0, 1)
    return atoms


def varies(atoms: Tensor, axes: Sequence[int]) -> bool:
    """Whether channels lie along these axes."""
    atoms = compact(atoms)
    return any(atoms.shape[a] > 1 and bool((atoms != atoms.narrow(a, 0, 1)).any()) for a in axes)


def row_vids(
    at: Tensor,
    base: int,
    old: tuple[int, ...],
    axes: list[int],
    keeps: bool,
    shape: tuple[int, ...] | torch.Size,
) -> Tensor:
    """Vids of the output of a row op, given the parent's row of each row (FREE stays).

    Args:
        at: parent's row for each row, (K').
        base: first vid of the parent's output.
        old: shape of the parent's output.
        axes: the input's axes that are reduced.
        keeps: whether the output has them.
        shape: of the input of this run.
    """
    kept = [a for a in range(len(shape)) if a not in axes]
    width = math.prod(old[a] for a in axes) if keeps else 1
    kept_now = [shape[a] for a in kept]
    if keeps:  # the parent's output is numbered in its own order: renumber through its permutation
        table = torch.arange(math.prod(old)).reshape(old).permute(*kept, *axes).reshape(-1, width)
    else:
        table = torch.arange(math.prod(old)).reshape(-1, 1)
    vids = torch.where((at < 0)[:, None], at[:, None], table[at.clamp(min=0)] + base)
    if not keeps:
        return vids.reshape(kept_now)
    vids = vids.reshape(*kept_now, *(old[a] for a in axes))
    back = [0] * len(old)
    for position, axis in enumerate([*kept, *axes]):
        back[axis] = position
    return vids.permute(back)
