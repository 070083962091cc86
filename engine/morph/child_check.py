"""Second run, of the widened child: every value of every op must be a copy of a value of the parent, or the run stops.

It checks the intertwining condition op'(E h) = E op(h) op by op. Each element of the child carries the number of the
parent's value that it equals, and an op only passes on numbers that its own operands prove. Nothing is computed. The
run derives the column maps of linear weights (the parent column that each column copies); the plan gives the rest.
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from . import families
from .attributes import Named, name_ints, set_int, unname_ints
from .copies import CopyPlan, ParameterMap
from .example import Inputs
from .labels import Label, along, row_vids
from .lookup import FREE, MISSING, SlabRows
from .parent_run import ParentRun
from .primitives import (
    BarrierRecord,
    ElementwiseRecord,
    Entry,
    LinearCall,
    LinearRecord,
    Record,
    RowsRecord,
    Shape,
    ValueRecord,
)
from .running import first_line, output_leaves
from .tracer import Fault, Mismatch, Tracer

RUNS = 5  # one detects that an attribute must follow, one finds which, one confirms the result; two are spare
R = TypeVar("R", bound=Record)


class ChildCheck(Tracer):
    """Run `child`, a copy of the parent with vectors of the new sizes, against the parent's log."""

    real = False

    def __init__(self, child: nn.Module, found: ParentRun, plan: CopyPlan):
        super().__init__(child, found.table)
        self.found = found
        self.followed_parameters |= found.parameters.keys()
        self.plan = plan
        self.position = 0
        self.records: list[Record] = []  # remaining records of the current op, the next one first
        self.maps: dict[str, ParameterMap] = {}
        self.rerun = False  # an attribute still had the parent's value when it was read
        self.modules = dict(child.named_modules())
        for (name, axis), parents in plan.parents.items():
            self.maps[name] = ParameterMap(axis, parents, plan.free[name, axis])

    # ---------------------------------------------------------------- labels

    def constant_vid(self, value: float) -> int:
        return self.found.constants.get(struct.pack("d", value), MISSING)

    def parameter_label(self, name: str, tensor: Tensor) -> Label:
        old = self.found.parameters.get(name)
        if old is None:
            raise Mismatch(f"the child reads '{name}', but its parent does not")
        vids = old.vids
        made = self.maps.get(name)
        if made is not None and made.axis is not None and made.parents is not None:
            assert made.free is not None
            vids = vids.index_select(made.axis, made.parents)
            vids = torch.where(along(made.free, made.axis, vids.ndim), FREE, vids)
        return Label(vids, None, parameter=name)

    def begin(self, name: str, scalars: list[Any]) -> Entry:
        if self.position >= len(self.found.log):
            raise Mismatch("the child runs more ops than its parent")
        entry = self.found.log[self.position]
        self.position += 1
        self.records = list(entry.records)
        if entry.name != name:
            raise Mismatch(f"the child runs '{name}' where its parent runs '{entry.name}'", self.latest)
        if name not in _SIZED and not _equal_arguments(scalars, entry.scalars):
            raise Mismatch(f"'{name}' has other arguments than in the parent", self.latest)
        return entry

    def _next(self, kind: type[R]) -> R:
        """Return the record of the parent's step that this step repeats."""
        if not self.records or not isinstance(self.records[0], kind):
            raise Mismatch("the op is called differently than in the parent", self.latest)
        return self.records.pop(0)  # pyright: ignore[reportReturnType]

    # ---------------------------------------------------------------- primitive steps

    def elementwise(self, labels: list[Label]) -> Label:
        return self._joined(labels, self._next(ElementwiseRecord))

    def _joined(self, labels: list[Label], record: ElementwiseRecord) -> Label:
        if record.inner is not None:
            first = self._joined([labels[i] for i in record.first], record.inner)
            labels = [*(label for i, label in enumerate(labels) if i not in record.first), first]
        vids = [label.vids for label in labels]
        try:
            shape = torch.broadcast_shapes(*(v.shape for v in vids))
        except RuntimeError:
            raise Mismatch("operands have grown to different sizes", vids) from None
        if len(record.join.columns[0].shape) != len(shape):
            raise Mismatch("operands have other axes than in the parent", vids)
        at = record.join.find([v.expand(shape) for v in vids])
        if bool((at == MISSING).any()):
            raise Mismatch("operands are widened inconsistently", vids)
        return Label(torch.where(at < 0, at, at + record.base).reshape(shape), None)

    def along_channels(self, label: Label, axes: list[int]) -> bool:
        return self._next(ValueRecord).value

    def agree(self, values: list[Any]) -> None:
        if not _equal_arguments(values, self._next(ValueRecord).value):
            raise Mismatch("the op has other arguments than in the parent", self.latest)

    def group_count(self, channels: int, groups: int) -> int:
        width = self._next(ValueRecord).value
        if channels % width:
            raise Mismatch(f"{channels} channels do not make groups of {width}", self.latest)
        return channels // width

    def rows(self, label: Label, axes: list[int], outputs: list[Shape], keeps: bool) -> list[Label]:
        return self._found_rows(label, axes, keeps, "a reduced slab is not a copy of a slab of the parent")

    def statistic(self, label: Label, axes: list[int], extreme: bool) -> Label:
        if bool((label.vids == FREE).any()):
            raise Mismatch("a statistic over channels would include new channels", [label.vids])
        what = "an extreme misses channels" if extreme else "a mean over channels needs equal counts"
        return self._found_rows(label, axes, True, what)[0]

    def _found_rows(self, label: Label, axes: list[int], keeps: bool, what: str) -> list[Label]:
        """Find the slabs among those of the parent; `what` is the error if one is missing."""
        record = self._next(RowsRecord)
        if axes != record.axes:
            raise Mismatch("other axes are reduced than in the parent", [label.vids])
        at = record.index.find(label.slabs(axes))
        if bool((at == MISSING).any()):
            raise Mismatch(what, [label.vids])
        size = label.vids.shape
        return [Label(row_vids(at, base, shape, axes, keeps, size), None) for base, shape in record.outputs]

    def indices(self, label: Label, axes: list[int], shape: Shape) -> Label:
        record = self._next(RowsRecord)
        slabs = label.slabs(axes)
        ((base, old),) = record.outputs
        same = slabs.shape == record.index.rows.shape and torch.equal(slabs, record.index.rows)
        now = tuple(n for a, n in enumerate(label.vids.shape) if a not in axes) if len(old) < label.vids.ndim else None
        if same:
            return Label(torch.arange(base, base + math.prod(old)).reshape(old), None)
        now = now or tuple(1 if a in axes else n for a, n in enumerate(label.vids.shape))
        return Label(torch.full(now, MISSING), None)

    def barrier(self, labels: list[Label], outputs: list[Shape], why: str) -> list[Label]:
        record = self._next(BarrierRecord)
        for label, old in zip(labels, record.inputs, strict=True):
            if label.vids.shape != old.shape or not torch.equal(label.vids, old):
                raise Mismatch(record.why, [label.vids, old])
        return [Label(vids, None) for vids in record.outputs]

    def pick(self, name: str, label: Label, results: list[Label]) -> None:
        """Do nothing: the labels already show which elements were picked."""

    # ---------------------------------------------------------------- linear ops

    def linear(self, label: Label, call: LinearCall) -> Label:
        if self.records and isinstance(self.records[0], BarrierRecord):
            return self.barrier([label], [call.shape], "")[0]
        record = self._next(LinearRecord)
        slabs = label.vids.movedim(call.axis, 0).reshape(label.vids.shape[call.axis], -1)
        groups = record.groups
        if groups == 1 or record.wider:
            rows, free = self._inside_groups(call, label, slabs, record)
        else:
            rows, free, groups = self._whole_groups(call, label, slabs, record)
        if record.groups > 1:
            self.size("groups", call.groups, groups, label, call.axis)
        self._owner(call.name, len(slabs), len(rows), groups)
        picked = record.outputs[rows]
        view = [-1] + [1] * (picked.ndim - 1)
        return Label(torch.where(free.reshape(view), FREE, picked).movedim(0, call.axis), None)

    def _whole_groups(
        self, call: LinearCall, label: Label, slabs: Tensor, record: LinearRecord
    ) -> tuple[Tensor, Tensor, int]:
        """Copy whole groups; return the parent's output channel of each, the free ones, and the number of groups."""
        groups = record.groups
        inside, outside = len(record.index.rows) // groups, len(record.outputs) // groups
        parents, free = self.plan.rows(call.name, 0, self.found.shapes[call.name][0])
        width = inside if call.transposed else outside
        if len(slabs) % inside or len(parents) % width or len(slabs) // inside != len(parents) // width:
            raise Mismatch("groups have grown unevenly", [label.vids])
        now = len(slabs) // inside
        blocks, marks = parents.reshape(now, width), free.reshape(now, width)
        source = blocks[:, 0] // width
        whole = torch.equal(blocks, source[:, None] * width + torch.arange(width))
        if not whole or bool((marks != marks[:, :1]).any()):
            raise Mismatch("a group is copied in part, not as a whole", [label.vids])
        new = slabs.reshape(now, inside, -1)
        empty = marks[:, 0]
        arrives = (new == record.index.rows.reshape(groups, inside, -1)[source]).flatten(1).all(1)
        nothing = (new == FREE).any(2).all(1)
        if not bool(torch.where(empty, nothing, arrives).all()):
            raise Mismatch("the input channels of a group are not those of the group that it copies", [label.vids])
        self.maps.setdefault(call.name, ParameterMap())
        rows = (source[:, None] * outside + torch.arange(outside)).reshape(-1)
        return rows, empty.repeat_interleave(outside), now

    def _inside_groups(
        self, call: LinearCall, label: Label, slabs: Tensor, record: LinearRecord
    ) -> tuple[Tensor, Tensor]:
        """Copy columns within each group like the channels that they read, equally in all groups.

        Return the parent's output channels, and the free ones.
        """
        groups, channels = record.groups, len(record.outputs)
        rows_axis, columns_axis = call.axes
        parents, free = self.plan.rows(call.name, rows_axis, channels)
        if len(slabs) % groups or len(parents) % groups:
            raise Mismatch("groups have grown unevenly", [slabs])
        own = torch.arange(groups).repeat_interleave(len(parents) // groups)
        if not torch.equal(parents // (channels // groups), own):
            raise Mismatch("output channels are copied into other groups", [slabs])
        for new, before in zip(slabs.chunk(groups), record.index.rows.chunk(groups), strict=True):
            index = record.index if groups == 1 else SlabRows(before)
            at = index.find(new)
            if bool((at == MISSING).any()):
                bad = int((at == MISSING).nonzero()[0])
                raise Mismatch(f"input channel {bad} is not a copy of a channel of the parent", [label.vids])
            columns = _distribute(at, index.find(before))
            if columns is None:
                raise Mismatch("input channels of the parent are missing", [label.vids, record.index.rows])
            self._columns(call.name, columns_axis, columns)
        return parents, free

    def _columns(self, name: str, axis: int, columns: Tensor) -> None:
        made = self.maps.setdefault(name, ParameterMap())
        if made.columns is not None and not torch.equal(made.columns, columns):
            raise Mismatch(f"calls with differently widened inputs share '{name}'", self.latest)
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
        self.rerun |= type(self.modules[path]).forward not in _PLAIN  # a plain layer reads it only here
        if source is not None:
            self.found.sources[self.position, what] = source
            set_int(self.modules[source[0]], source[1], wanted)
            return
        running = dict.fromkeys(self.path or [""])
        if not sum(name_ints(self.modules[p], p, given) for p in running):
            raise Mismatch(f"{what} is {given} at every width", [*self.latest, label.vids])

    def _owner(self, name: str, inputs: int, outputs: int, groups: int) -> None:
        module = self.modules[name.rpartition(".")[0]]
        sizes = {"in_channels": inputs, "in_features": inputs, "out_channels": outputs, "out_features": outputs}
        for key, value in {**sizes, "groups": groups}.items():
            if isinstance(getattr(module, key, None), int):
                setattr(module, key, value)

    # ---------------------------------------------------------------- the run

    def forward(self, inputs: Inputs) -> Any:
        try:
            return super().forward(inputs)
        except (Mismatch, Fault):
            raise
        except Exception as error:  # at another width the network's code may raise anything
            raise Mismatch(f"its forward fails at another width: {first_line(error)}", self.latest) from error

    def finish(self, result: Any, old_result: list[Any]) -> dict[str, ParameterMap]:
        """Check the outputs, and return the maps of all tensors that change."""
        if self.position != len(self.found.log):
            raise Mismatch("the child runs fewer ops than its parent")
        flat = output_leaves(result)
        if len(flat) != len(old_result):
            raise Mismatch("the child returns a different structure than its parent")
        for leaf, old in zip(flat, old_result, strict=True):
            if isinstance(leaf, Tensor):
                vids = self.need(leaf).vids
                if not isinstance(old, Tensor) or vids.shape != old.shape or not torch.equal(vids, old):
                    raise Mismatch("an output would change", [vids])
            elif isinstance(old, Tensor) or not np.array_equal(leaf, old):
                raise Mismatch("an output that is not a tensor would change")
        return {name: m for name, m in self.maps.items() if m.changes(self.found.shapes[name])}


def run_child(
    child: nn.Module, found: ParentRun, plan: CopyPlan, inputs: Inputs, outputs: list[Any]
) -> dict[str, ParameterMap]:
    """Check a child whose vectors have the plan's sizes, and set its attributes to these sizes.

    Args:
        child: a copy of the parent, as `Spaces.check` builds it.
        found: the parent's run.
        plan: copies of each channel.
        inputs: the inputs of the parent's run.
        outputs: vids of the parent's outputs.

    Returns:
        The maps of all tensors that change.

    Raises:
        Mismatch: an op of the child would not compute copies of the parent's values.
    """
    try:
        for left in reversed(range(RUNS)):
            run = ChildCheck(child, found, plan)
            given = replace(inputs, tensors=tuple(x.clone() for x in inputs.tensors))
            for x, vids in zip(given.tensors, found.input_vids, strict=True):
                run.set_label(x, Label(vids, None))
            try:
                maps = run.finish(run.forward(given), outputs)
            except Mismatch as error:
                if run.rerun and left:
                    continue  # the failing op may have read the attribute too
                raise Mismatch(f"{error} ({run.where_now})", error.vids) from error
            if not run.rerun:
                return maps
        raise Mismatch("sizes that modules store as attributes contradict each other")
    finally:
        for module in child.modules():
            unname_ints(module)


_PLAIN = {m.forward for m in (nn.GroupNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_PLAIN |= {m.forward for m in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)}
_SIZED = {*families.NORMS, *families.CONVOLUTIONS, "linear"}


def _equal_arguments(a: list[Any], b: list[Any]) -> bool:
    """Return whether plain arguments are equal; `Named` ints count as ints."""
    a = [int(x) if isinstance(x, Named) else x for x in a]
    return len(a) == len(b) and all(type(x) is type(y) and (x == y or (x != x and y != y)) for x, y in zip(a, b))  # noqa: B905


def _distribute(at: Tensor, canonical: Tensor) -> Tensor | None:
    """Return the parent's column of each new column; equal columns of the parent share the copies in order.

    The result is None if a column of the parent gets no copy.
    """
    columns = at.clone()
    values, counts = torch.unique(canonical, return_counts=True)
    for value in values[counts > 1].tolist():
        members = (canonical == value).nonzero().reshape(-1)
        indices = (at == value).nonzero().reshape(-1)
        columns[indices] = members[torch.arange(len(indices)) * len(members) // max(len(indices), 1)]
    seen = torch.zeros(len(canonical), dtype=torch.bool)
    seen[columns[columns >= 0]] = True
    return columns if bool(seen.all()) else None
