"""Which channels are copies of each other: equal in the stored numbers of everything that belongs to them."""

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

Folds = dict[str, tuple[int, ...]]  # space key -> of each of its units, the first one that is equal


@dataclass(frozen=True)
class Units:
    """What is folded as a whole in a space: its classes (channels, groups), or each channel by itself.

    They differ under a LayerNorm, a GroupNorm or a mean over channels, where all channels of a class count together.

    Attributes:
        names: the units, in the order of the members.
        places: for each member the unit at each place (-1: of another space).
    """

    names: list[int]
    places: dict[Axis, np.ndarray]

    @classmethod
    def of(cls, spaces: Spaces, space: Space, fine: bool) -> Units:
        """Classes, or `fine` channels."""
        atoms = spaces.found.atoms
        places: dict[Axis, np.ndarray] = {}
        for member in space.members:
            roots = atoms.roots(spaces.found.axes[member])
            inside = np.isin(roots, space.order)
            places[member] = np.where(inside, atoms.channels(spaces.found.axes[member]) if fine else roots, -1)
        order = dict.fromkeys(np.concatenate(list(places.values())).tolist()) if fine else dict.fromkeys(space.order)
        order.pop(-1, None)
        return cls(list(order), places)

    def ties(self, digests: Mapping[Axis, Sequence[bytes]]) -> tuple[int, ...]:
        """For each unit the first one with equal slices of all their tensors, by the digests of the slices."""
        number = {unit: i for i, unit in enumerate(self.names)}
        marks: list[list[bytes]] = [[] for _ in self.names]
        for member, place in self.places.items():
            for mark in marks:
                mark.append(b"|")
            for unit, digest in zip(place.tolist(), digests[member], strict=True):
                if unit >= 0:
                    marks[number[unit]].append(digest)
        first: dict[bytes, int] = {}
        return tuple(first.setdefault(b"".join(mark), i) for i, mark in enumerate(marks))


def kept_width(spaces: Spaces, space: Space, folds: Folds) -> int:
    """Width of a space after a fold."""
    first = folds[space.key]
    units = Units.of(spaces, space, len(first) != len(space.order))
    kept = [unit for i, unit in enumerate(units.names) if first[i] == i]
    return min(int(np.isin(place, kept).sum()) for place in units.places.values())


def find_ties(spaces: Spaces) -> dict[str, list[Folds]]:
    """Of each space in which something is tied, what can be folded: classes, or else single channels."""
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
    """A digest of each slice; -0 counts as 0."""
    rows = (tensor.detach().cpu() + 0.0).movedim(axis, 0).reshape(tensor.shape[axis], -1)
    data = rows.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in data]
