"""Labels of tensor elements: a value number (vid) each and, in the parent, an atom (its channel on some axis)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Label:
    """Label of one tensor: a value number per element and, in the parent, an atom per element (same shape)."""

    vids: Tensor
    atoms: Tensor | None
    version: int = 0
    parameter: str | None = None  # name, if the tensor is a parameter or buffer

    def reshape(self, shape: Sequence[int]) -> Label:
        """Return the label in another shape."""
        return Label(self.vids.reshape(shape), None if self.atoms is None else self.atoms.reshape(shape))

    def on_axis(self, axis: int, ndim: int) -> Label:
        """Reshape a vector to `ndim` axes, along one of them."""
        return Label(along(self.vids, axis, ndim), None if self.atoms is None else along(self.atoms, axis, ndim))

    def as_channels(self, ndim: int) -> Label:
        """Reshape a vector (C) to (1, C, 1, ...); a scalar stays a scalar."""
        if self.vids.ndim == 0:
            return self
        return self.on_axis(1 if ndim > 1 else 0, max(ndim, 1))

    def spread_over(self, like: Label) -> Label:
        """Expand a statistic of `like` to the shape of `like`; it belongs to the same channels."""
        return Label(self.vids.expand(like.vids.shape), like.atoms)

    def slabs(self, axes: list[int]) -> Tensor:
        """Return the vids as rows (K, M), one per slab along `axes`."""
        others = self.others(axes)
        count = math.prod(self.vids.shape[a] for a in others)
        return self.vids.permute(*others, *axes).reshape(count, -1)

    def others(self, axes: list[int]) -> list[int]:
        """Return all axes except these."""
        return [a for a in range(self.vids.ndim) if a not in axes]


def along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """Reshape a vector to `ndim` axes, along one of them."""
    return values.reshape([-1 if a == axis else 1 for a in range(ndim)])


def no_atoms(shape: Sequence[int]) -> Tensor:
    """Return the atoms of values that belong to no channel."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def known_atoms(label: Label) -> Tensor:
    """Return the atoms, which all labels of the parent have."""
    assert label.atoms is not None
    return label.atoms


def compact(atoms: Tensor) -> Tensor:
    """Reduce expanded axes to size 1."""
    for axis in range(atoms.ndim):
        if atoms.stride(axis) == 0 and atoms.shape[axis] > 1:
            atoms = atoms.narrow(axis, 0, 1)
    return atoms


def essential(atoms: Tensor) -> Tensor:
    """Reduce axes along which the atoms are constant to size 1."""
    atoms = compact(atoms)
    for axis in range(atoms.ndim):
        if atoms.shape[axis] > 1 and bool((atoms == atoms.narrow(axis, 0, 1)).all()):
            atoms = atoms.narrow(axis, 0, 1)
    return atoms


def varies(atoms: Tensor, axes: Sequence[int]) -> bool:
    """Return whether the atoms vary along these axes, so that they contain a channel axis."""
    atoms = compact(atoms)
    return any(atoms.shape[a] > 1 and bool((atoms != atoms.narrow(a, 0, 1)).any()) for a in axes)


def row_vids(at: Tensor, base: int, old: Sequence[int], axes: list[int], keeps: bool, shape: Sequence[int]) -> Tensor:
    """Return the vids of the output of a row op, given the parent's row of each row (FREE stays FREE).

    Args:
        at: the parent's row of each row, (K').
        base: first vid of the parent's output.
        old: shape of the parent's output.
        axes: the input's axes that are reduced.
        keeps: whether the output still has these axes.
        shape: shape of the input of this run.
    """
    others = [a for a in range(len(shape)) if a not in axes]
    width = math.prod(old[a] for a in axes) if keeps else 1
    sizes = [shape[a] for a in others]
    table = torch.arange(math.prod(old))
    if keeps:  # the parent's output is numbered in its own axis order, so the numbers are permuted
        table = table.reshape(old).permute(*others, *axes)
    table = table.reshape(-1, width)
    vids = torch.where((at < 0)[:, None], at[:, None], table[at.clamp(min=0)] + base)
    if not keeps:
        return vids.reshape(sizes)
    back = torch.tensor([*others, *axes]).argsort().tolist()
    return vids.reshape(*sizes, *(old[a] for a in axes)).permute(back)
