"""Second run, of the widened program: every op must find each of its values among the parent's, or the run stops.

The check of the intertwining condition op'(E h) = E op(h), op by op: the child's element carries the number of the
parent's value that it equals, and no op passes on a number that its own operands do not prove. Nothing is computed;
linear weights get their maps here (which parent column each column copies), everything else comes from the plan.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attributes import Named, name_ints, set_int, unname_ints
from .discover import Axis, Discover, row_vids
from .lookup import FREE, MISSING, Rows
from .provenance import Entry, Fault, Label, Mismatch, Tracer

RUNS = 5  # one to see that an attribute has to follow, one to see which, one to see that all is well; two to spare
Copies = dict[int, tuple[int, int]]  # class (root atom) -> copies of each of its channels, and free ones


@dataclass
class ParameterMap:
    """How one tensor of the child is made of the parent's."""

    axis: int | None = None  # along which whole slices are copied
    parents: Tensor | None = None  # parent's slice of each slice
    free: Tensor | None = None  # which of them are new and random instead (of a weight)
    columns_axis: int | None = None  # along which a linear weight is split
    columns: Tensor | None = None  # parent's column of each column; FREE: zero


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


def make_plan(found: Discover, copies: Copies) -> Plan:
    """Order rule: maximal runs of equal class, without borders, are tiled as wholes, the free ones last (5.4)."""
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
        if _moved(parents, len(roots)) or bool(free.any()):
            plan.parents[axis], plan.free[axis] = parents, free
    return plan


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


class Rebuild(Tracer):
    """Runs `child`, a copy of the parent whose vectors have the new sizes, against the parent's log."""

    real = False

    def __init__(self, child: nn.Module, found: Discover, plan: Plan):
        super().__init__(child, found.table)
        self.found = found
        self.followed_parameters |= found.parameters.keys()
        self.plan = plan
        self.position = 0
        self.entry: Entry | None = None
        self.step = 0
        self.maps: dict[str, ParameterMap] = {}
        self.again = False  # an attribute had the parent's value when it was read
        self.modules = dict(child.named_modules())
        for (name, axis), parents in plan.parents.items():
            self.maps[name] = ParameterMap(axis, parents, plan.free[name, axis])

    # ---------------------------------------------------------------- labels

    def constant_vid(self, value: float) -> int:
        return self.found.constants.get(struct.pack("d", value), MISSING)

    def constant_label(self, tensor: Tensor) -> Label:
        values, inverse = torch.unique(tensor.detach().double().reshape(-1), return_inverse=True)
        vids = torch.tensor([self.constant_vid(v) for v in values.tolist()], dtype=torch.int64)
        return Label(vids[inverse].reshape(tensor.shape), None)

    def parameter_label(self, name: str, tensor: Tensor) -> Label:
        old = self.found.parameters.get(name)
        if old is None:
            raise Mismatch(f"'{name}' is read, which the parent does not")
        vids = old.vids
        made = self.maps.get(name)
        if made is not None and made.axis is not None and made.parents is not None:
            assert made.free is not None
            vids = vids.index_select(made.axis, made.parents)
            shape = [1] * vids.ndim
            shape[made.axis] = -1
            vids = torch.where(made.free.reshape(shape), FREE, vids)
        return Label(vids, None, parameter=name)

    def begin(self, name: str, scalars: list[Any]) -> Entry:
        if self.position >= len(self.found.log):
            raise Mismatch("the child runs more ops than its parent")
        self.entry = self.found.log[self.position]
        self.position += 1
        self.step = 0
        if self.entry.name != name:
            raise Mismatch(f"the child runs '{name}' where its parent runs '{self.entry.name}'", self.latest)
        if name not in _SIZED and not _same(scalars, self.entry.scalars):
            raise Mismatch(f"'{name}' has other arguments than in the parent", self.latest)
        return self.entry

    def _next(self) -> Any:
        assert self.entry is not None
        self.step += 1
        return self.entry.steps[self.step - 1]

    # ---------------------------------------------------------------- steps

    def elementwise(self, labels: list[Label]) -> Label:
        small: tuple[int, ...] = self._next()
        if small:
            big = [label for i, label in enumerate(labels) if i not in small]
            labels = [*big, self.elementwise([labels[i] for i in small])]
        try:
            shape = torch.broadcast_shapes(*(label.vids.shape for label in labels))
        except RuntimeError:
            raise Mismatch("operands have grown to different sizes", [label.vids for label in labels]) from None
        join, base = self._next()
        if len(join.columns[0].shape) != len(shape):
            raise Mismatch("operands have other axes than in the parent", [label.vids for label in labels])
        at = join.find([label.vids.expand(shape) for label in labels])
        if bool((at == MISSING).any()):
            raise Mismatch("operands are widened inconsistently", [label.vids for label in labels])
        return Label(torch.where(at < 0, at, at + base).reshape(shape), None)

    def spread(self, label: Label, axes: list[int]) -> bool:
        return self._next()

    def agree(self, values: list[Any]) -> None:
        if not _same(values, self._next()):
            raise Mismatch("the op has other arguments than in the parent", self.latest)

    def group_count(self, channels: int, groups: int) -> int:
        width = self._next()
        if channels % width:
            raise Mismatch(f"{channels} channels do not make groups of {width}", self.latest)
        return channels // width

    def rows(self, label: Label, axes: list[int], outputs: list[tuple[int, ...]] | None, keeps: bool) -> list[Label]:
        index, bases, old_axes, _ = self._next()
        kept = [a for a in range(label.vids.ndim) if a not in axes]
        if axes != old_axes:
            raise Mismatch("other axes are reduced than in the parent", [label.vids])
        slabs = label.vids.permute(*kept, *axes).reshape(math.prod(label.vids.shape[a] for a in kept), -1)
        at = index.find(slabs)
        if bool((at == MISSING).any()):
            raise Mismatch("a reduced slab is no copy of one of the parent's", [label.vids])
        return [Label(row_vids(at, base, shape, kept, axes, keeps, label.vids.shape), None) for base, shape in bases]

    def statistic(self, label: Label, axes: list[int], extreme: bool) -> Label:
        bags, base, old_axes = self._next()
        if axes != old_axes:
            raise Mismatch("other axes are reduced than in the parent", [label.vids])
        kept = [a for a in range(label.vids.ndim) if a not in axes]
        slabs = label.vids.permute(*kept, *axes).reshape(math.prod(label.vids.shape[a] for a in kept), -1)
        if bool((slabs == FREE).any()):
            raise Mismatch("a statistic over channels would see new channels", [label.vids])
        row = bags.find(slabs)
        if bool((row < 0).any()):
            what = "an extreme misses channels" if extreme else "a mean over channels needs equal counts"
            raise Mismatch(what, [label.vids])
        shape = [1 if a in axes else s for a, s in enumerate(label.vids.shape)]
        return Label((base + row).reshape(shape), None)

    def barrier(self, labels: list[Label], outputs: list[tuple[int, ...]], why: str) -> list[Label]:
        inputs, results, why = self._next()
        for label, old in zip(labels, inputs, strict=True):
            if label.vids.shape != old.shape or not torch.equal(label.vids, old):
                raise Mismatch(why, [label.vids, old])
        return [Label(vids, None) for vids in results]

    # ---------------------------------------------------------------- linear ops

    def linear(self, name: str, label: Label, axis: int, kind: tuple[bool, int, tuple[int, ...]]) -> Label:
        transposed, groups, shape = kind
        axis %= label.vids.ndim
        record = self._next()
        if record is None:
            return self.barrier([label], [shape], "")[0]
        old, index, out, old_groups, wider = record
        slabs = label.vids.movedim(axis, 0).reshape(label.vids.shape[axis], -1)
        if old_groups == 1:
            at = index.find(slabs)
            if bool((at == MISSING).any()):
                bad = int((at == MISSING).nonzero()[0])
                raise Mismatch(f"input channel {bad} is no copy of one of the parent's", [label.vids])
            columns = _distribute(at, index.find(old))
            if columns is None:
                raise Mismatch("input channels of the parent are missing", [label.vids, old])
            rows, free = self._grouped_rows(name, 1 if transposed else 0, out.shape[0])
            self._columns(name, 0 if transposed else 1, columns)
        elif wider:
            rows, free = self._inside_groups(name, slabs, old, old_groups, out.shape[0])
            self.size("groups", groups, old_groups, label, axis)
        else:
            rows, free, now = self._groups(name, label, slabs, old, old_groups, transposed, out.shape[0])
            self.size("groups", groups, now, label, axis)
            groups = now
        self._owner(name, len(slabs), len(rows), groups if old_groups > 1 else 1)
        picked = out[rows]
        view = [-1] + [1] * (picked.ndim - 1)
        vids = torch.where(free.reshape(view), FREE, picked).movedim(0, axis)
        return Label(vids, None)

    def _grouped_rows(self, name: str, axis: int, count: int) -> tuple[Tensor, Tensor]:
        if (name, axis) in self.plan.parents:
            return self.plan.parents[name, axis], self.plan.free[name, axis]
        return torch.arange(count), torch.zeros(count, dtype=torch.bool)

    def _groups(
        self, name: str, label: Label, slabs: Tensor, old: Tensor, groups: int, transposed: bool, out_channels: int
    ) -> tuple[Tensor, Tensor, int]:
        """Whole groups are copied: (parent's output channel of each, which are free, number of groups)."""
        inside, outside = len(old) // groups, out_channels // groups
        parents, free = self._grouped_rows(name, 0, self.found.shapes[name][0])
        width = inside if transposed else outside
        if len(slabs) % inside or len(parents) % width or len(slabs) // inside != len(parents) // width:
            raise Mismatch("groups have grown unevenly", [label.vids])
        now = len(slabs) // inside
        blocks, marks = parents.reshape(now, width), free.reshape(now, width)
        source = blocks[:, 0] // width
        if not torch.equal(blocks, source[:, None] * width + torch.arange(width)) or bool(
            (marks != marks[:, :1]).any()
        ):
            raise Mismatch("groups are not copied as wholes", [label.vids])
        new = slabs.reshape(now, inside, -1)
        empty = marks[:, 0]
        arrives = (new == old.reshape(groups, inside, -1)[source]).flatten(1).all(1)
        nothing = (new == FREE).any(2).all(1)
        if not bool(torch.where(empty, nothing, arrives).all()):
            raise Mismatch("a group's input channels are not those of the group it copies", [label.vids])
        self.maps.setdefault(name, ParameterMap())
        rows = (source[:, None] * outside + torch.arange(outside)).reshape(-1)
        return rows, empty.repeat_interleave(outside), now

    def _inside_groups(
        self, name: str, slabs: Tensor, old: Tensor, groups: int, out_channels: int
    ) -> tuple[Tensor, Tensor]:
        """Channels are copied within their group, in all groups alike: (parent's output channel of each, free ones)."""
        parents, free = self._grouped_rows(name, 0, out_channels)
        if len(slabs) % groups or len(parents) % groups:
            raise Mismatch("groups have grown unevenly", [slabs])
        if not torch.equal(
            parents // (out_channels // groups), torch.arange(groups).repeat_interleave(len(parents) // groups)
        ):
            raise Mismatch("output channels are copied into other groups", [slabs])
        for new, before in zip(slabs.chunk(groups), old.chunk(groups), strict=True):
            index = Rows(before)
            at = index.find(new)
            columns = None if bool((at == MISSING).any()) else _distribute(at, index.find(before))
            if columns is None:
                raise Mismatch("a group's input channels are not those of the same group", [slabs])
            self._columns(name, 1, columns)
        return parents, free

    def _columns(self, name: str, axis: int, columns: Tensor) -> None:
        made = self.maps.setdefault(name, ParameterMap())
        if made.columns is not None and not torch.equal(made.columns, columns):
            raise Mismatch(f"'{name}' is shared by calls whose inputs are widened differently", self.latest)
        made.columns_axis, made.columns = axis, columns

    def size(self, what: str, given: int, wanted: int, label: Label, axis: int) -> None:
        if given == wanted:
            return
        path = self.path[-1] if self.path else ""
        source = self.found.sources.get((self.position, what))
        if source is None and type(self.modules[path]).forward in _PLAIN:
            source = path, what
        elif source is None and isinstance(given, Named):
            source = given.source
        self.again |= type(self.modules[path]).forward not in _PLAIN  # those read it here and nowhere else
        if source is not None:
            self.found.sources[self.position, what] = source
            set_int(self.modules[source[0]], source[1], wanted)
            return
        running = dict.fromkeys(self.path or [""])
        if not sum(name_ints(self.modules[p], p, given) for p in running):
            raise Mismatch(f"{what} is {given} whatever the width", [*self.latest, label.vids])

    def _owner(self, name: str, inputs: int, outputs: int, groups: int) -> None:
        module = self.modules[name.rpartition(".")[0]]
        sizes = {"in_channels": inputs, "in_features": inputs, "out_channels": outputs, "out_features": outputs}
        for key, value in {**sizes, "groups": groups}.items():
            if isinstance(getattr(module, key, None), int):
                setattr(module, key, value)

    # ---------------------------------------------------------------- the run

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        try:
            return super().forward(inputs)
        except (Mismatch, Fault):
            raise
        except Exception as error:  # the network's code may raise anything at another width
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise Mismatch(f"its forward fails at another width: {text}", self.latest) from error

    def finish(self, result: Any, old_result: list[Any]) -> dict[str, ParameterMap]:
        """Check the outputs; the maps of all tensors that change."""
        from torch.utils._pytree import tree_flatten

        if self.position != len(self.found.log):
            raise Mismatch("the child runs fewer ops than its parent")
        flat = tree_flatten(result)[0]
        if len(flat) != len(old_result):
            raise Mismatch("the child returns another structure than its parent")
        for leaf, old in zip(flat, old_result, strict=True):
            if isinstance(leaf, Tensor):
                vids = self.need(leaf).vids
                if not isinstance(old, Tensor) or vids.shape != old.shape or not torch.equal(vids, old):
                    raise Mismatch("an output would change", [vids])
            elif isinstance(old, Tensor) or not np.array_equal(leaf, old):
                raise Mismatch("an output that is no tensor would change")
        return {name: m for name, m in self.maps.items() if _changes(m, self.found.shapes[name])}


def run_child(
    child: nn.Module, found: Discover, plan: Plan, inputs: tuple[Tensor, ...], outputs: list[Any]
) -> dict[str, ParameterMap]:
    """Check a child whose vectors have the plan's sizes; it gets the attributes that go with them.

    Args:
        child: a copy of the parent, as `Spaces.check` makes it.
        found: the parent's run.
        plan: copies of each channel.
        inputs: of the parent's run.
        outputs: vids of the parent's outputs.

    Returns:
        The maps of all tensors that change.

    Raises:
        Mismatch: an op of the child would not compute copies of what the parent's computes.
    """
    try:
        for left in reversed(range(RUNS)):
            run = Rebuild(child, found, plan)
            given = tuple(x.clone() for x in inputs)
            for x, vids in zip(given, found.input_vids, strict=True):
                run.set_label(x, Label(vids, None))
            try:
                maps = run.finish(run.forward(given), outputs)
            except Mismatch as error:
                if run.again and left:
                    continue  # it may have read the attribute too
                raise Mismatch(f"{error} ({run.where_now})", error.vids) from error
            if not run.again:
                return maps
        raise Mismatch("sizes that modules keep as attributes contradict one another")
    finally:
        for module in child.modules():
            unname_ints(module)


_PLAIN = {m.forward for m in (nn.GroupNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_PLAIN |= {m.forward for m in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)}
_SIZED = {*"layer_norm group_norm rms_norm batch_norm instance_norm linear".split()}
_SIZED |= {f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)}


def _same(a: list[Any], b: list[Any]) -> bool:
    """Whether plain arguments are the same; `Named` ints count as ints."""
    a = [int(x) if isinstance(x, Named) else x for x in a]
    return len(a) == len(b) and all(type(x) is type(y) and (x == y or (x != x and y != y)) for x, y in zip(a, b))  # noqa: B905


def _distribute(at: Tensor, canonical: Tensor) -> Tensor | None:
    """Parent's column of each new one; equal columns of the parent share the copies in order. None if one gets none."""
    columns = at.clone()
    values, counts = torch.unique(canonical, return_counts=True)
    for value in values[counts > 1].tolist():
        members = (canonical == value).nonzero().reshape(-1)
        places = (at == value).nonzero().reshape(-1)
        columns[places] = members[torch.arange(len(places)) * len(members) // max(len(places), 1)]
    seen = torch.zeros(len(canonical), dtype=torch.bool)
    seen[columns[columns >= 0]] = True
    return columns if bool(seen.all()) else None


def _changes(made: ParameterMap, shape: tuple[int, ...]) -> bool:
    rows = made.axis is not None and made.parents is not None and _moved(made.parents, shape[made.axis])
    columns = made.columns is not None and made.columns_axis is not None
    return rows or (columns and _moved(made.columns, shape[made.columns_axis]))  # pyright: ignore


def _moved(index: Tensor, size: int) -> bool:
    return len(index) != size or not torch.equal(index, torch.arange(size))
