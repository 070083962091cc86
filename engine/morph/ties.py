"""Ties between channels: channels are copies of each other if all of their stored numbers are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .parent_run import Axis
from .spaces import Space, Spaces
from .tensors import named_tensors

Folds = dict[str, tuple[int, ...]]  # space key -> the first equal unit of each of its units


@dataclass(frozen=True)
class Units:
    """Units of a space that are folded as a whole: its classes (channels, groups), or single channels.

    The two differ under a LayerNorm, a GroupNorm or a mean over channels, where a class consists of many channels.

    Attributes:
        names: the units, in the order of the members.
        index: for each member, the unit at each index (-1 for a unit of another space).
    """

    names: list[int]
    index: dict[Axis, np.ndarray]

    @classmethod
    def of(cls, spaces: Spaces, space: Space, fine: bool) -> Units:
        """Build the units: classes, or single channels with `fine`."""
        atoms = spaces.found.atoms
        index: dict[Axis, np.ndarray] = {}
        for member in space.members:
            roots = atoms.roots(spaces.found.axes[member])
            inside = np.isin(roots, space.order)
            index[member] = np.where(inside, atoms.channels(spaces.found.axes[member]) if fine else roots, -1)
        order = dict.fromkeys(np.concatenate(list(index.values())).tolist()) if fine else dict.fromkeys(space.order)
        order.pop(-1, None)
        return cls(list(order), index)

    def ties(self, digests: Mapping[Axis, Sequence[bytes]]) -> tuple[int, ...]:
        """Return for each unit the first unit with equal slices of all tensors, by the digests of the slices."""
        number = {unit: i for i, unit in enumerate(self.names)}
        marks: list[list[bytes]] = [[] for _ in self.names]
        for member, units_at in self.index.items():
            for mark in marks:
                mark.append(b"|")
            for unit, digest in zip(units_at.tolist(), digests[member], strict=True):
                if unit >= 0:
                    marks[number[unit]].append(digest)
        first: dict[bytes, int] = {}
        return tuple(first.setdefault(b"".join(mark), i) for i, mark in enumerate(marks))


def width_after_fold(spaces: Spaces, space: Space, folds: Folds) -> int:
    """Return the width of a space after a fold."""
    first = folds[space.key]
    units = Units.of(spaces, space, len(first) != len(space.order))
    remaining = [unit for i, unit in enumerate(units.names) if first[i] == i]
    return min(int(np.isin(units_at, remaining).sum()) for units_at in units.index.values())


def find_ties(spaces: Spaces) -> dict[str, list[Folds]]:
    """Return the possible folds of each space with ties: classes first, then single channels."""
    tensors = named_tensors(spaces.model)
    digests: dict[Axis, list[bytes]] = {}
    result: dict[str, list[Folds]] = {}
    for space in spaces:
        for fine in (False, True):
            units = Units.of(spaces, space, fine)
            if len(units.names) < 2 or (fine and len(units.names) == len(space.order)):
                continue
            for name, axis in space.members:
                if (name, axis) not in digests:
                    digests[name, axis] = _digests(tensors[name], axis)
            first = units.ties(digests)
            if len(set(first)) < len(first):
                result.setdefault(space.key, []).append({space.key: first})
    return result


def _digests(tensor: Tensor, axis: int) -> list[bytes]:
    """Return a digest of each slice; -0 counts as 0."""
    rows = (tensor.detach().cpu() + 0.0).movedim(axis, 0).reshape(tensor.shape[axis], -1)
    data = rows.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in data]
