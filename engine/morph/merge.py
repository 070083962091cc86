"""Merging: the exact inverse of widening, where the copies of a channel are still copies.

Channels are folded if everything that belongs to them is equal in the stored numbers: rows of weights, biases, norm
parameters, running statistics. Their outgoing weights are added. The proof is that of widening, read backwards: the
network that was given must pass, op by op, as a widening of the one that is returned (section 4), and its rows and
columns must be that widening's. So channels that only look alike are left as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import MorphError
from ..tiling.memory import freed_pages_kept
from .attributes import get_int, set_int
from .discover import Axis
from .provenance import Fault, Mismatch
from .rebuild import ParameterMap, make_plan, run_child
from .spaces import GROUPS, Space, Spaces, _resize, _skeleton, find_spaces
from .verify import Certificate, Example, Report, as_inputs, cast, duplicate, verified_report
from .widen import replace_contents

Sizes = dict[tuple[str, str], int]  # by module and attribute
Folds = dict[str, list[int]]  # space key -> of each of its units, the first one that is equal


@freed_pages_kept()
def merge(model: nn.Module, example: Example, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """A narrower network that computes the same function, with every set of tied channels folded into one.

    Args:
        model: any eager network, e.g. one that was widened; untouched unless `inplace`.
        example: its input or tuple of inputs; a small image will do unless a linear layer wants the real size.
        inplace: put the result into `model` after all checks have passed.

    Returns:
        The narrower network and the report. Sums of outgoing weights are exact after a Kraft or Sterbenz split; if
        some had to be rounded (trained since), the report says how many, and has no certificate.

    Raises:
        MorphError: no channels are tied, or folding any of them would change the function; nothing has been changed.
    """
    inputs = as_inputs(example)
    child, passes, groups, changes, certificate = _merge(model, inputs)
    step = {"op": "merge", "example": [list(x.shape) for x in inputs], "passes": passes, "groups": groups}
    if certificate.violations:  # the function is compared where that rounding does not hide anything
        changes.append(f"{certificate.violations} of {certificate.entries} sums of outgoing weights are rounded")
        exact = cast(duplicate(model), torch.float64)
        doubles = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        report = verified_report(step, exact, _merge(exact, doubles)[0], example, changes=changes)
    else:
        report = verified_report(step, model, child, example, changes=changes, certificate=certificate)
    return (replace_contents(model, child) if inplace else child), report


def rebuild(model: nn.Module, step: Mapping[str, Any]) -> nn.Module:
    """Repeat a merge on another instance of the network, whatever its weights; those of the result are to be loaded.

    Args:
        model: an instance of the same class and size as the network that was merged; untouched.
        step: `Report.step`, also after a round trip through JSON.

    Raises:
        MorphError: the network is of another architecture.
    """
    like = next(model.parameters(), torch.zeros(()))
    inputs = tuple(torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in step["example"])
    for folds, groups in zip(step["passes"], step["groups"], strict=True):
        spaces = find_spaces(model, *inputs, groups=groups)
        for key, first in folds.items():
            if len(first) not in (len(_units(spaces, spaces[key], fine)[0]) for fine in (False, True)):
                raise MorphError(f"space {key} has another width than in the network that was merged")
        try:
            model, _ = _fold(spaces, folds, tied=False)
        except Mismatch as error:
            raise MorphError(f"this merge does not fit the network: {error}") from None
    return model


# ------------------------------------------------------------------------------------------------ what is tied


def _units(spaces: Spaces, space: Space, fine: bool) -> tuple[list[int], dict[Axis, np.ndarray]]:
    """What is folded as a whole: the space's classes (channels, groups), or `fine` each channel.

    They differ under a LayerNorm, a GroupNorm or a mean over channels, where all channels of a class count together.

    Returns:
        The units, in the order of the members, and for each member the unit at each place (-1: of another space).
    """
    atoms = spaces.found.atoms
    places: dict[Axis, np.ndarray] = {}
    for member in space.members:
        roots = atoms.roots(spaces.found.axes[member])
        inside = np.isin(roots, space.order)
        places[member] = np.where(inside, atoms.channels(spaces.found.axes[member]) if fine else roots, -1)
    order = dict.fromkeys(np.concatenate(list(places.values())).tolist()) if fine else dict.fromkeys(space.order)
    order.pop(-1, None)
    return list(order), places


def _kept(spaces: Spaces, space: Space, folds: Folds) -> int:
    """Width of a space after a fold."""
    fine = len(folds[space.key]) != len(space.order)
    units, places = _units(spaces, space, fine)
    kept = [unit for i, unit in enumerate(units) if folds[space.key][i] == i]
    return min(int(np.isin(place, kept).sum()) for place in places.values())


def _ties(spaces: Spaces) -> dict[str, list[Folds]]:
    """Of each space in which something is tied, what can be folded: classes, or else single channels.

    A fold has for each unit the first one with equal slices of all their tensors.
    """
    tensors = _tensors(spaces.model)
    hashes: dict[Axis, list[bytes]] = {}
    result: dict[str, list[Folds]] = {}
    for space in spaces:
        for fine in (False, True):
            units, places = _units(spaces, space, fine)
            if len(units) < 2 or (fine and len(units) == len(space.order)):
                continue
            number = {unit: i for i, unit in enumerate(units)}
            marks: list[list[bytes]] = [[] for _ in units]
            for member in space.members:
                if member not in hashes:
                    hashes[member] = _hashes(tensors[member[0]], member[1])
                for mark in marks:
                    mark.append(b"|")
                for unit, digest in zip(places[member].tolist(), hashes[member], strict=True):
                    if unit >= 0:
                        marks[number[unit]].append(digest)
            first: dict[bytes, int] = {}
            folds = [first.setdefault(b"".join(m), i) for i, m in enumerate(marks)]
            if len(first) < len(units):
                result.setdefault(space.key, []).append({space.key: folds})
    return result


def _hashes(tensor: Tensor, axis: int) -> list[bytes]:
    """A digest of each slice; -0 counts as 0."""
    rows = (tensor.detach().cpu() + 0.0).movedim(axis, 0).reshape(tensor.shape[axis], -1)
    data = rows.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in data]


# ------------------------------------------------------------------------------------------------ folding


def _merge(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[nn.Module, list[Folds], list[str], list[str], Certificate]:
    """The child, what was folded in each pass, with which meaning of groups, in words, and the sums of weights."""
    child, certificate = model, Certificate()
    passes: list[Folds] = []
    groups: list[str] = []
    changes: list[str] = []
    reason = "no two channels are exact copies of each other; there is nothing to merge"
    untried = list(GROUPS)
    while untried:  # copies in one layer may become equal only after those in the layer before have been folded
        spaces = find_spaces(child, *inputs, groups=untried[0])
        try:
            result = _fold_most(spaces, _ties(spaces))
        except Mismatch as error:
            result, reason = None, str(error)
        if result is None:
            untried = untried[1:] if spaces.found.has_groups else []
            continue
        child, folds, part = result
        for space in spaces:
            if space.key in folds:
                changes.append(f"space {space.id} ({space.key}): {space.width} -> {_kept(spaces, space, folds)}")
        passes.append(folds)
        groups.append(untried[0])
        certificate += part
        untried = [*GROUPS[GROUPS.index(untried[0]) :], *GROUPS[: GROUPS.index(untried[0])]]
    if not passes:
        raise MorphError(reason)
    return child, passes, groups, changes, certificate


def _fold_most(spaces: Spaces, ties: Mapping[str, list[Folds]]) -> tuple[nn.Module, Folds, Certificate] | None:
    """Fold all that is tied, or as many spaces as pass the proof; None if nothing is tied.

    Spaces that cannot grow are folded when no other can be: where a shuffle wants an even number of channels, whether
    a space is found free depends on the widths that were tried. The proof does not.

    Raises:
        Mismatch: none passes.
    """
    reason: Mismatch | None = None
    for frozen in (False, True):
        tied = [kinds for key, kinds in ties.items() if bool(spaces[key].frozen) == frozen]
        if not tied:
            continue
        folds: Folds = {key: fold for kinds in tied for key, fold in kinds[0].items()}
        try:
            child, certificate = _fold(spaces, folds)
            return child, folds, certificate
        except Mismatch as error:
            reason = reason or error
        done: Folds = {}
        best = None
        for kinds in tied:
            for kind in kinds:
                try:
                    best = _fold(spaces, done | kind)
                except Mismatch:
                    continue
                done |= kind
                break
        if best is not None:
            return best[0], done, best[1]
    if reason is not None:
        raise Mismatch(f"channels are equal, but folding them would change the function: {reason}")
    return None


def _fold(spaces: Spaces, folds: Folds, tied: bool = True) -> tuple[nn.Module, Certificate]:
    """The narrower network.

    Raises:
        Mismatch: the parent is no widening of it.
    """
    kept_rows, rows, kept_columns, sizes = _maps(spaces, folds)
    parents = _tensors(spaces.model)
    small: dict[str, Tensor] = {}
    for name, tensor in parents.items():
        value = tensor.detach()
        for axis, index in [*kept_rows.get(name, {}).items(), *kept_columns.get(name, {}).items()]:
            value = value.index_select(axis, index.to(value.device))
        small[name] = value
    wider = spaces.found.groups == "wider"
    child = _with_tensors(spaces.model, small, sizes, wider)
    try:
        reduced = find_spaces(child, *spaces.inputs, groups=spaces.found.groups)
    except Fault:
        raise
    except MorphError as error:
        raise Mismatch(str(error)) from error
    maps = _prove(reduced, rows)
    certificate = Certificate()
    for name, made in maps.items():
        value, mine = parents[name].detach(), rows.get(name, {})
        axis = made.axis
        if axis is not None and made.parents is not None:
            if axis not in mine or not torch.equal(made.parents, mine[axis]):
                raise Mismatch(f"'{name}' would be folded otherwise")
            narrow = value.index_select(axis, kept_rows[name][axis].to(value.device))
            if tied and not torch.equal(narrow.index_select(axis, made.parents.to(value.device)), value):
                raise Mismatch(f"the rows of '{name}' are not equal")
            value = narrow
        if made.columns is not None and made.columns_axis is not None:
            if len(made.columns) != value.shape[made.columns_axis]:  # of other groups
                raise Mismatch(f"'{name}' would be folded otherwise")
            value, part = _add_columns(value, made.columns, made.columns_axis)
            certificate += part
        if value.shape != small[name].shape:
            raise Mismatch(f"'{name}' would be folded otherwise")
        small[name] = value
    left = [name for name in (*kept_rows, *kept_columns) if name not in maps]
    if left:
        raise Mismatch(f"'{left[0]}' would not be folded back")
    return _with_tensors(spaces.model, small, sizes, wider), certificate


def _maps(
    spaces: Spaces, folds: Folds
) -> tuple[dict[str, dict[int, Tensor]], dict[str, dict[int, Tensor]], dict[str, dict[int, Tensor]], Sizes]:
    """By tensor and axis: rows that are kept, the kept row (by its new place) of each old row, columns that are kept;
    and by module and attribute the sizes that functional calls are given.

    The k-th row or column of a unit is folded into the k-th one of the unit that represents it.
    """
    found = spaces.found
    every = np.arange(found.atoms.size)
    unit = roots = found.atoms.roots(every)
    into: dict[int, int] = {}
    for key, first in folds.items():
        space = spaces[key]
        fine = len(first) != len(space.order)
        units, _ = _units(spaces, space, fine)
        if fine:
            unit = np.where(np.isin(roots, space.order), found.atoms.channels(every), unit)
        into |= {units[i]: units[j] for i, j in enumerate(first) if i != j}

    def fold(atoms: np.ndarray) -> tuple[Tensor, Tensor] | None:
        names: list[int] = unit[atoms].tolist()
        if not any(n in into for n in names):
            return None
        kept = [i for i, n in enumerate(names) if n not in into]
        rank: dict[int, int] = {}
        place: dict[tuple[int, int], int] = {}
        for new, i in enumerate(kept):
            place[names[i], rank.setdefault(names[i], 0)] = new
            rank[names[i]] += 1
        seen: dict[int, int] = {}
        back = []
        for n in names:
            k: int = seen.get(n, -1) + 1
            seen[n] = k
            if (into.get(n, n), k) not in place:
                raise Mismatch("tied channels are read differently often")
            back.append(place[into.get(n, n), k])
        return torch.tensor(kept), torch.tensor(back)

    kept_rows: dict[str, dict[int, Tensor]] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    kept_columns: dict[str, dict[int, Tensor]] = {}
    for (name, axis), atoms in found.axes.items():
        if (result := fold(atoms)) is not None:
            kept_rows.setdefault(name, {})[axis], rows.setdefault(name, {})[axis] = result
    for (name, axis), atoms in found.columns.items():
        if (result := fold(atoms)) is not None:
            kept_columns.setdefault(name, {})[axis] = result[0]
    sizes: Sizes = {}
    for where, source in found.sources.items():
        if (result := fold(found.sized[where])) is not None:
            before = get_int(spaces.model.get_submodule(source[0]), source[1])
            sizes[source] = before * len(result[0]) // len(found.sized[where])
    return kept_rows, rows, kept_columns, sizes


def _prove(reduced: Spaces, rows: Mapping[str, Mapping[int, Tensor]]) -> dict[str, ParameterMap]:
    """Check that copying the reduced network's rows thus is a widening; its maps, with those of the columns."""
    found = reduced.found
    plan = make_plan(found, {})
    for name, axes in rows.items():
        for axis, parents in axes.items():
            if (name, axis) not in found.axes:
                raise Mismatch(f"'{name}' is used otherwise at another width")
            plan.parents[name, axis], plan.free[name, axis] = parents, torch.zeros(len(parents), dtype=torch.bool)
    wide = _skeleton(reduced.model, plan, found)
    return run_child(wide, found, plan, reduced.inputs, reduced.outputs)


def _add_columns(weight: Tensor, columns: Tensor, axis: int) -> tuple[Tensor, Certificate]:
    """Columns with the same number added; a violation is a sum that the weight's type cannot hold.

    Sums are distilled in float64 (error-free two-sums, repeated), so that a sum that is representable comes out
    as it is, however its parts are ordered.
    """
    parts = weight.cpu().double().movedim(axis, 0)
    counts = torch.bincount(columns)
    order = torch.argsort(columns, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    total = torch.zeros((len(counts), *parts.shape[1:]), dtype=torch.float64)
    entries = violations = 0
    for copies in torch.unique(counts).tolist():
        here = (counts == copies).nonzero().reshape(-1)
        terms = [parts[order[starts[here] + k]] for k in range(copies)]
        for _ in range(copies - 1):
            for k in range(1, copies):
                a, b = terms[k - 1], terms[k]
                after = a + b
                back = after - a
                terms[k - 1], terms[k] = (a - (after - back)) + (b - back), after
        result = terms[-1]
        rest = torch.zeros_like(result, dtype=torch.bool)
        for term in terms[:-1]:
            rest |= term != 0
        rounded = result.to(weight.dtype)
        violations += int((rest | (rounded.double() != result)).sum())
        entries += result.numel()
        total[here] = result
    return total.movedim(0, axis).to(weight.dtype).contiguous().to(weight.device), Certificate(entries, violations)


# ------------------------------------------------------------------------------------------------ networks


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, shared ones under every name."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _with_tensors(model: nn.Module, values: Mapping[str, Tensor], sizes: Sizes, wider: bool) -> nn.Module:
    """A copy of the model with other tensors, some of them smaller, and its modules' sizes set to that."""
    old = _tensors(model)
    changed = {id(old[name]): value for name, value in values.items() if value.shape != old[name].shape}
    child = duplicate(model, {id(t): t for t in old.values()})
    made: dict[int, Tensor] = {}
    for module in child.modules():
        shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    data = changed[id(tensor)] if id(tensor) in changed else tensor.detach()
                    data = data.clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
                store[key] = made[id(tensor)]  # pyright: ignore[reportArgumentType]
                if made[id(tensor)].shape != tensor.shape:
                    shapes[key] = (tensor.shape, made[id(tensor)].shape)
        _fit(module, shapes, wider)
    for (path, key), size in sizes.items():
        set_int(child.get_submodule(path), key, size)
    return child


def _fit(module: nn.Module, shapes: Mapping[str, tuple[torch.Size, torch.Size]], wider: bool) -> None:
    """Set the sizes that a module keeps as attributes."""
    for before, after in shapes.values():
        if isinstance(module, nn.GroupNorm) and module.num_channels == before.numel():
            module.num_groups = module.num_groups * after.numel() // before.numel()  # groups keep their width
        if sum(s > 1 for s in before) <= 1:
            _resize(module, before.numel(), after.numel())
    if "weight" not in shapes:
        return
    before, after = shapes["weight"]
    if isinstance(module, _ConvNd):
        if module.groups > 1 and not (wider and before[1] > 1 and not module.transposed):
            module.groups = module.groups * after[0] // before[0]
        inside, outside = (0, 1) if module.transposed else (1, 0)
        sizes = {inside: after[inside], outside: after[outside]}
        sizes[1] *= module.groups
        module.in_channels, module.out_channels = sizes[inside], sizes[outside]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = after
