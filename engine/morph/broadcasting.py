"""Broadcasting of labelled tensors: which channels it unites, and which it freezes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .atoms import FIXED, Atoms
from .borders import Borders
from .labels import Label, compact, known_atoms, no_atoms, varies
from .primitives import Shape


def meet(labels: list[Label], shape: Shape, atoms: Atoms, borders: Borders, where: str) -> Tensor:
    """Unite the atoms of broadcast operands, and return the atoms of the result.

    Args:
        labels: labels of the operands.
        shape: shape of the result.
        atoms: union-find over the channels.
        borders: borders between runs of channels.
        where: name of the op in messages.
    """
    operands = [_Operand.of(label, len(shape)) for label in labels]
    # The channel axis of a parameter is a guess. If it conflicts with known channels, it is an axis of positions.
    known: set[int] = set().union(*(operand.varies for operand in operands if not operand.stored))
    for i, operand in enumerate(operands):
        if operand.stored and operand.varies and operand.stretched(shape) & known:
            atoms.freeze(operand.atoms, f"it runs along an axis that has no channels ({where})")
            operands[i] = operand.without_channels()
    # After a concatenation along the tokens, only this op shows that all tokens have the same channels.
    operands.sort(key=lambda operand: len(operand.varies) > 1)
    main = set().union(*(operand.varies for operand in operands))
    for operand in operands:
        if operand.one_channel() and operand.stretched(shape) & main:
            atoms.freeze(operand.atoms, f"its one channel is broadcast ({where})")
    joined: Tensor | None = None
    for operand in operands:
        if operand.stretched(shape) & main:
            if operand.varies:
                for other in operands:
                    atoms.freeze(other.atoms, f"channels of two axes are multiplied ({where})")
                return no_atoms(shape)
        elif joined is None:
            joined = operand.atoms if main or bool((operand.atoms != FIXED).any()) else None
        elif main or bool((operand.atoms != FIXED).any()):
            a, b = torch.broadcast_tensors(joined, operand.atoms)
            atoms.unite(a.numpy(), b.numpy(), f"it meets a tensor of fixed size ({where})")
            borders.meet(a.numpy(), b.numpy())
            joined = torch.where(a == FIXED, b, a)
    return (no_atoms(()) if joined is None else joined).expand(shape)


@dataclass(frozen=True)
class _Operand:
    """One operand: its atoms (expanded axes have size 1), its size, its channel axes, and whether it is a parameter."""

    atoms: Tensor
    size: Shape
    varies: set[int]
    stored: bool

    @classmethod
    def of(cls, label: Label, ndim: int) -> _Operand:
        """Build the operand with `ndim` axes, aligned as in broadcasting."""
        atoms = compact(known_atoms(label))
        atoms = atoms.reshape((1,) * (ndim - atoms.ndim) + tuple(atoms.shape))
        size = (1,) * (ndim - label.vids.ndim) + tuple(label.vids.shape)
        return cls(atoms, size, {a for a in range(ndim) if varies(atoms, [a])}, label.parameter is not None)

    def without_channels(self) -> _Operand:
        return replace(self, atoms=no_atoms((1,) * len(self.size)), varies=set())

    def stretched(self, shape: Shape) -> set[int]:
        """Return the axes along which broadcasting to `shape` repeats it."""
        return {a for a, s in enumerate(shape) if self.size[a] == 1 and s > 1}

    def one_channel(self) -> bool:
        """Return whether it is a single channel that may grow."""
        return not self.varies and self.atoms.numel() > 0 and int(self.atoms.reshape(-1)[0]) != FIXED
