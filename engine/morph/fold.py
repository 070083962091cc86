"""Folding of tied channels into one; an op-by-op check proves that the given network is a widening of the result.

Channels are tied, i.e. copies of each other, if all of their stored numbers are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MorphError
from .attributes import follow_head, get_int, set_int
from .child_check import run_child
from .copies import ParameterMap, make_plan
from .copying import Shapes, duplicate, fill, named_tensors, resized
from .parent_run import Axis
from .spaces import Space, Spaces, find_spaces, resize_attributes, skeleton
from .splits import by_copies, exact_sum
from .step import Certificate
from .surgery import CONVS
from .tracer import Fault, Mismatch

Folds = dict[str, tuple[int, ...]]  # space key -> the first equal unit of each of its units


def fold(spaces: Spaces, folds: Folds, tied: bool = True) -> tuple[nn.Module, Certificate]:
    """Fold channels; return the narrower network, and a certificate of the sums of outgoing weights.

    Args:
        spaces: the channel spaces of the network.
        folds: the units that are folded into one.
        tied: whether rows must be equal; otherwise the first row of each set is used.

    Raises:
        Mismatch: the given network is not a widening of the narrower one.
    """
    index = _Indices.of(spaces, folds)
    parents = named_tensors(spaces.model)
    small: dict[str, Tensor] = {name: tensor.detach() for name, tensor in parents.items()}
    for (name, axis), remaining in [*index.remaining_rows.items(), *index.remaining_columns.items()]:
        small[name] = small[name].index_select(axis, remaining.to(small[name].device))
    wider = spaces.found.groups == "wider"
    child = _with_tensors(spaces.model, small, index.sizes, wider)
    try:
        reduced = find_spaces(child, spaces.inputs, groups=spaces.found.groups)
    except Fault:
        raise
    except MorphError as error:
        raise Mismatch(str(error)) from error
    maps = _prove(reduced, index.rows)
    certificate = Certificate()
    for name, made in maps.items():
        value, part = _folded(name, parents[name].detach(), made, index, tied)
        if value.shape != small[name].shape:
            raise Mismatch(f"'{name}' would be folded differently")
        small[name] = value
        certificate += part
    left = [name for name, _ in (*index.remaining_rows, *index.remaining_columns) if name not in maps]
    if left:
        raise Mismatch(f"'{left[0]}' would not be folded back")
    return _with_tensors(spaces.model, small, index.sizes, wider), certificate


def _folded(name: str, value: Tensor, made: ParameterMap, index: _Indices, tied: bool) -> tuple[Tensor, Certificate]:
    """Fold one tensor, given the map of the widening from the narrower network to the given one."""
    axis = made.axis
    if axis is not None and made.parents is not None:
        rows = index.rows.get((name, axis))
        if rows is None or not torch.equal(made.parents, rows):
            raise Mismatch(f"'{name}' would be folded differently")
        narrow = value.index_select(axis, index.remaining_rows[name, axis].to(value.device))
        if tied and not torch.equal(narrow.index_select(axis, made.parents.to(value.device)), value):
            raise Mismatch(f"the rows of '{name}' are not equal")
        value = narrow
    if made.columns is None or made.columns_axis is None:
        return value, Certificate()
    if len(made.columns) != value.shape[made.columns_axis]:  # the columns are of other groups
        raise Mismatch(f"'{name}' would be folded differently")
    return add_columns(value, made.columns, made.columns_axis)


@dataclass
class _Indices:
    """Slices of each tensor that remain after a fold.

    Attributes:
        remaining_rows: rows that remain.
        rows: for each old row, the new index of the row that replaces it.
        remaining_columns: columns that remain.
        sizes: sizes that modules pass to functional calls, by module and attribute.
    """

    remaining_rows: dict[Axis, Tensor] = field(default_factory=dict)
    rows: dict[Axis, Tensor] = field(default_factory=dict)
    remaining_columns: dict[Axis, Tensor] = field(default_factory=dict)
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, spaces: Spaces, folds: Folds) -> _Indices:
        """Build the indices: row or column k of a unit is folded into row or column k of its representative."""
        found, result = spaces.found, cls()
        unit, into = _representatives(spaces, folds)
        for axis, atoms in found.axes.items():
            if (folded := _fold_indices(unit[atoms].tolist(), into)) is not None:
                result.remaining_rows[axis], result.rows[axis] = folded
        for axis, atoms in found.columns.items():
            if (folded := _fold_indices(unit[atoms].tolist(), into)) is not None:
                result.remaining_columns[axis] = folded[0]
        for where, source in found.sources.items():
            if (folded := _fold_indices(unit[found.sized[where]].tolist(), into)) is not None:
                before = get_int(spaces.model.get_submodule(source[0]), source[1])
                result.sizes[source] = before * len(folded[0]) // len(found.sized[where])
        return result


def _representatives(spaces: Spaces, folds: Folds) -> tuple[np.ndarray, dict[int, int]]:
    """Return the unit of each atom, and the representative of each unit that is folded."""
    found = spaces.found
    every = np.arange(found.atoms.size)
    unit = roots = found.atoms.roots(every)
    into: dict[int, int] = {}
    for key, first in folds.items():
        space = spaces[key]
        fine = len(first) != len(space.order)
        names = Units.of(spaces, space, fine).names
        if fine:
            unit = np.where(np.isin(roots, space.order), found.atoms.channels(every), unit)
        into |= {names[i]: names[j] for i, j in enumerate(first) if i != j}
    return unit, into


def _fold_indices(names: list[int], into: dict[int, int]) -> tuple[Tensor, Tensor] | None:
    """Return the indices of an axis that remain, and the new index of each old one; None if all remain."""
    if not any(n in into for n in names):
        return None
    remaining = [i for i, n in enumerate(names) if n not in into]
    rank: dict[int, int] = {}
    position: dict[tuple[int, int], int] = {}
    for new, i in enumerate(remaining):
        position[names[i], rank.setdefault(names[i], 0)] = new
        rank[names[i]] += 1
    seen: dict[int, int] = {}
    back = []
    for n in names:
        k: int = seen.get(n, -1) + 1
        seen[n] = k
        if (into.get(n, n), k) not in position:
            raise Mismatch("tied channels are read different numbers of times")
        back.append(position[into.get(n, n), k])
    return torch.tensor(remaining), torch.tensor(back)


def _prove(reduced: Spaces, rows: dict[Axis, Tensor]) -> dict[str, ParameterMap]:
    """Check that copying these rows of the reduced network is a widening; return its maps, including columns."""
    found = reduced.found
    plan = make_plan(found, {})
    for axis, parents in rows.items():
        if axis not in found.axes:
            raise Mismatch(f"'{axis[0]}' is used differently at another width")
        plan.parents[axis], plan.free[axis] = parents, torch.zeros(len(parents), dtype=torch.bool)
    wide = skeleton(reduced.model, plan, found)
    return run_child(wide, found, plan, reduced.inputs, reduced.outputs)


def add_columns(weight: Tensor, columns: Tensor, axis: int) -> tuple[Tensor, Certificate]:
    """Add the columns with the same number; a violation is a sum that the weight's dtype cannot represent."""
    parts = weight.cpu().double().movedim(axis, 0)
    total = parts.new_zeros((int(columns.max()) + 1, *parts.shape[1:]))
    violations = 0
    for into, copies in by_copies(columns):
        total[into], rest = exact_sum([parts[index] for index in copies])
        rounded = total[into].to(weight.dtype)
        violations += int((rest | (rounded.double() != total[into])).sum())
    certificate = Certificate(total.numel(), violations)
    return total.movedim(0, axis).to(weight.dtype).contiguous().to(weight.device), certificate


def _with_tensors(
    model: nn.Module, values: dict[str, Tensor], sizes: dict[tuple[str, str], int], wider: bool
) -> nn.Module:
    """Copy the model with other tensors, some of them smaller, and set the sizes of its modules accordingly."""
    old = named_tensors(model)
    changed = {id(old[name]): value for name, value in values.items() if value.shape != old[name].shape}
    child = duplicate(model, {id(t): t for t in old.values()})
    fill(child, model, lambda t: (changed[id(t)] if id(t) in changed else t.detach()).clone())
    for module, source in zip(child.modules(), model.modules(), strict=True):
        _fit(module, resized(module, source), wider)
    for (path, key), size in sizes.items():
        set_int(child.get_submodule(path), key, size)
    follow_head(model, child)
    return child


def _fit(module: nn.Module, shapes: dict[str, Shapes], wider: bool) -> None:
    """Set the sizes that a module stores as attributes."""
    for before, after in shapes.values():
        if isinstance(module, nn.GroupNorm) and module.num_channels == before.numel():
            module.num_groups = module.num_groups * after.numel() // before.numel()  # the width of a group is constant
        resize_attributes(module, before, after)
    if "weight" not in shapes:
        return
    before, after = shapes["weight"]
    if isinstance(module, (*CONVS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        if module.groups > 1 and not (wider and before[1] > 1 and not module.transposed):
            module.groups = module.groups * after[0] // before[0]
        inside, outside = (0, 1) if module.transposed else (1, 0)
        sizes = {inside: after[inside], outside: after[outside]}
        sizes[1] *= module.groups
        module.in_channels, module.out_channels = sizes[inside], sizes[outside]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = after


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
