"""First run, of the parent: number every value, unite the atoms that must grow together, and write a log.

Soundness does not depend on the unions and freezes. They only decide what is attempted; `ChildCheck` checks every op.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import families
from .atoms import FIXED, Atoms, Borders
from .copying import named_tensors
from .labels import Label, along, compact, essential, known_atoms, no_atoms, row_vids, varies
from .lookup import Bags, Join, PositionTable, SlabRows
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
from .tracer import Tracer

Axis = tuple[str, int]  # parameter or buffer name, axis


class ParentRun(Tracer):
    """Run that labels values with numbers and atoms; its results are `log`, `atoms`, `axes` and `atom_of`."""

    def __init__(self, model: nn.Module, table: PositionTable, groups: str = "more"):
        super().__init__(model, table)
        self.groups = groups
        self.has_groups = False  # whether some groups could get wider
        self.atoms = Atoms()
        self.borders = Borders(self.atoms)
        self.axes: dict[Axis, np.ndarray] = {}  # atoms of every parameter axis that might grow
        self.columns: dict[Axis, np.ndarray] = {}  # atoms that arrive at a linear op's input axis
        self.linear_names: set[str] = set()
        self.fixed: dict[str, str] = {}  # matrices that ops other than linear ones read, with the reason
        self.log: list[Entry] = []
        self.constants: dict[bytes, int] = {}
        self.next_vid = 0
        self.blocks: list[Tensor] = []  # atom of every vid, in order
        self.input_vids: list[Tensor] = []
        # Sizes among an op's arguments, by the op's index in the log and the argument's name: their channels, and the
        # module and attribute that they come from, which the second run finds.
        self.sized: dict[tuple[int, str], np.ndarray] = {}
        self.sources: dict[tuple[int, str], tuple[str, str]] = {}
        self.shapes = {name: tuple(t.shape) for name, t in named_tensors(model).items()}

    # ---------------------------------------------------------------- numbers

    def number(self, atoms: Tensor) -> Tensor:
        """Create new vids for values with these atoms."""
        vids = torch.arange(self.next_vid, self.next_vid + atoms.numel()).reshape(atoms.shape)
        self.next_vid += atoms.numel()
        self.blocks.append(atoms.reshape(-1))
        return vids

    def atom_of(self) -> Tensor:
        """Return the atom of every vid."""
        return torch.cat(self.blocks) if self.blocks else torch.zeros(0, dtype=torch.int64)

    def constant_vid(self, value: float) -> int:
        key = struct.pack("d", value)
        if key not in self.constants:
            self.constants[key] = int(self.number(no_atoms((1,))))
        return self.constants[key]

    def parameter_label(self, name: str, tensor: Tensor) -> Label:
        wide = [a for a in range(tensor.ndim) if tensor.shape[a] > 1]
        if name in self.linear_names:
            self._fix(name, f"{self.where_now} reads '{name}' as a whole")
            wide = [0, 1]
        atoms = no_atoms(tensor.shape)
        axis = _channel_axis(tensor, wide)
        if axis is not None and name not in self.linear_names:
            self.axes[name, axis] = self.atoms.new(tensor.shape[axis])
            atoms = along(torch.from_numpy(self.axes[name, axis]), axis, tensor.ndim).expand(tensor.shape)
        return Label(self.number(atoms), atoms, parameter=name)

    # ---------------------------------------------------------------- bookkeeping

    def need(self, tensor: Tensor) -> Label:
        label = super().need(tensor)
        wide = [a for a in range(tensor.ndim) if tensor.shape[a] > 1]
        if (
            label.parameter is not None
            and len(wide) > 1
            and (label.parameter, _channel_axis(tensor, wide)) not in self.axes
        ):
            self._fix(label.parameter, f"{self.where_now} reads '{label.parameter}' as a whole")
        return label

    def _fix(self, name: str, why: str) -> None:
        if name in self.fixed:
            return
        self.fixed[name] = why
        for known in (self.axes, self.columns):
            for (owner, _), atoms in known.items():
                if owner == name:
                    self.atoms.freeze(atoms, why)

    def begin(self, name: str, scalars: list[Any]) -> Entry:
        entry = Entry(name, scalars, self.where_now)
        self.log.append(entry)
        return entry

    def freeze(self, atoms: Tensor | np.ndarray, why: str) -> None:
        self.atoms.freeze(compact(atoms) if isinstance(atoms, Tensor) else atoms, f"{why} ({self.where_now})")

    def _record(self, record: Record) -> None:
        self.log[-1].records.append(record)

    # ---------------------------------------------------------------- primitive steps

    def elementwise(self, labels: list[Label]) -> Label:
        result, record = self._joined(labels)
        self._record(record)
        return result

    def _joined(self, labels: list[Label]) -> tuple[Label, ElementwiseRecord]:
        shape = torch.broadcast_shapes(*(label.vids.shape for label in labels))
        small = tuple(i for i, label in enumerate(labels) if label.vids.numel() < math.prod(shape))
        small = small if 2 <= len(small) < len(labels) else ()  # small operands are joined first, at their own size
        inner = None
        if small:
            first, inner = self._joined([labels[i] for i in small])
            labels = [*(label for i, label in enumerate(labels) if i not in small), first]
        atoms = meet(labels, shape, self.atoms, self.borders, self.where_now)
        base, vids = self.next_vid, self.number(atoms)
        columns = [label.vids.expand(shape) for label in labels]
        join = Join(self.table, columns)
        if join.main is None and vids.numel():  # equal operands give equal values
            vids = vids.reshape(-1)[join.find(columns)].reshape(shape)
        return Label(vids, atoms), ElementwiseRecord(join, base, small, inner)

    def along_channels(self, label: Label, axes: list[int]) -> bool:
        found = varies(known_atoms(label), axes)
        self._record(ValueRecord(found))
        return found

    def agree(self, values: list[Any]) -> None:
        self._record(ValueRecord(values))

    def size(self, what: str, given: int, wanted: int, label: Label, axis: int) -> None:
        self.sized[len(self.log), what] = _channels(label, axis)

    def rows(self, label: Label, axes: list[int], outputs: list[Shape], keeps: bool) -> list[Label]:
        atoms = known_atoms(label)
        if varies(atoms, axes):
            self.freeze(atoms, "it is reduced over its channels")
            atoms = no_atoms(atoms.shape)
        slabs = label.slabs(axes)
        index = SlabRows(slabs)
        canonical = index.find(slabs)
        for a in axes:
            atoms = atoms.narrow(a, 0, 1)
        if not keeps:
            atoms = atoms.reshape([atoms.shape[a] for a in label.others(axes)])
        results, bases = [], []
        for shape in outputs:
            base = self.next_vid
            self.number(atoms.expand(shape))
            vids = row_vids(canonical, base, shape, axes, keeps, label.vids.shape)
            results.append(Label(vids, atoms.expand(shape)))
            bases.append((base, shape))
        self._record(RowsRecord(index, tuple(bases), axes))
        return results

    def statistic(self, label: Label, axes: list[int], extreme: bool) -> Label:
        slabs = label.slabs(axes)
        self._unite_slabs(Label(known_atoms(label), None).slabs(axes), extreme)
        shape = tuple(1 if a in axes else s for a, s in enumerate(label.vids.shape))
        atoms = no_atoms(shape)
        base = self.next_vid
        self.number(atoms)
        bags = Bags(slabs, extreme)
        self._record(RowsRecord(bags, ((base, shape),), axes))
        return Label((base + bags.find(slabs)).reshape(shape), atoms)

    def indices(self, label: Label, axes: list[int], shape: Shape) -> Label:
        self._record(RowsRecord(SlabRows(label.slabs(axes)), ((self.next_vid, shape),), axes))
        return Label(self.number(no_atoms(shape)), no_atoms(shape))

    def _unite_slabs(self, atoms: Tensor, extreme: bool) -> None:
        """Require equal counts of channels (rows of atoms) that a statistic reduces, or freeze them."""
        if not bool((atoms != atoms[:1]).any()):  # all rows have the same channels
            if extreme:
                return
            atoms = atoms[:1]
        elif extreme:
            self.freeze(atoms, "it is reduced over its channels in groups")
            return
        elif bool((self._roots(atoms) == self._roots(atoms[:, :1])).all()):
            return
        alike = atoms[:, :1].expand_as(atoms).numpy()
        self.atoms.unite(atoms.numpy(), alike, f"a mean ({self.where_now})", statistic=True)

    def _roots(self, atoms: Tensor) -> Tensor:
        return torch.from_numpy(self.atoms.roots(atoms.numpy()))

    def group_count(self, channels: int, groups: int) -> int:
        self._record(ValueRecord(channels // groups))
        return groups

    def barrier(self, labels: list[Label], outputs: list[Shape], why: str) -> list[Label]:
        for label in labels:
            self.freeze(known_atoms(label), why)
            if label.parameter is not None:
                self._fix(label.parameter, f"{why} ({self.where_now})")
        results = [Label(self.number(no_atoms(shape)), no_atoms(shape)) for shape in outputs]
        self._record(BarrierRecord([label.vids for label in labels], [label.vids for label in results], why))
        return results

    # ---------------------------------------------------------------- linear ops

    def linear(self, label: Label, call: LinearCall) -> Label:
        name, others = call.name, label.others([call.axis])
        if name in self.parameters:
            self._fix(name, f"{self.where_now} uses '{name}', which other ops read as a whole")
        self.linear_names.add(name)
        if varies(known_atoms(label), others) or name in self.fixed:
            why = self.fixed.get(name, "a linear op runs across its channels")
            self._fix(name, f"{why} ({self.where_now})")
            return self.barrier([label], [call.shape], why)[0]
        arriving = _channels(label, call.axis)
        can_widen = False
        if call.groups > 1:
            self.size("groups", call.groups, call.groups, label, call.axis)
            can_widen = self.shapes[name][1] > 1 and not call.transposed  # several input channels per group
            self.has_groups |= can_widen
        wider = can_widen and self.groups == "wider"
        rows = self._rows(call, arriving, wider or call.groups == 1)
        atoms = along(torch.from_numpy(rows), call.axis, label.vids.ndim).expand(call.shape)
        vids = self.number(atoms)
        slabs = label.vids.movedim(call.axis, 0).reshape(label.vids.shape[call.axis], -1)
        self._record(LinearRecord(SlabRows(slabs), vids.movedim(call.axis, 0), call.groups, wider))
        return Label(vids, atoms)

    def _new_axis(self, name: str, axis: int) -> np.ndarray:
        if (name, axis) not in self.axes:
            self.axes[name, axis] = self.atoms.new(self.shapes[name][axis])
        return self.axes[name, axis]

    def _rows(self, call: LinearCall, arriving: np.ndarray, inside_groups: bool) -> np.ndarray:
        """Return the atoms of the output channels, and unite those of channels that are copied equally.

        Either whole groups are copied, and the channels within each are united; or channels are copied inside their
        groups, equally at the same index of all groups.
        """
        single = call.groups == 1
        rows = self._new_axis(call.name, call.axes[0] if single else 0)
        own, inside = rows.reshape(call.groups, -1), arriving.reshape(call.groups, -1)
        why = f"a {'shared weight also' if single else 'grouped convolution'} reads fixed channels ({self.where_now})"
        if inside_groups:
            seen = self.columns.setdefault((call.name, call.axes[1]), inside[0])
            self.atoms.unite(seen, inside[0], why)
            self.borders.meet(seen, inside[0])
        for part in (own, inside):
            first = part[:1] if inside_groups else inside[:, :1]
            self.atoms.unite(np.broadcast_to(first, part.shape), part, why)
            if inside_groups:
                self.borders.cut(part[:-1, -1], part[1:, 0])
        if inside_groups:
            return rows
        self.borders.step((inside[:-1, -1], inside[1:, 0]), (own[:-1, -1], own[1:, 0]))
        return np.repeat(inside[:, 0], self.shapes[call.name][1]) if call.transposed else rows

    # ---------------------------------------------------------------- fixed indices

    def pick(self, name: str, label: Label, results: list[Label]) -> None:
        if name in families.CHUNKS:
            self._pick_chunks(known_atoms(label), [known_atoms(result) for result in results])
            return
        atoms = essential(known_atoms(label))
        before = np.unique(atoms.numpy())
        for result in results:
            now = essential(known_atoms(result))
            if not np.array_equal(np.unique(now.numpy()), before) or (now.numel() != atoms.numel() and len(before) > 1):
                self.freeze(atoms, "it is cut or repeated at fixed indices")
                return

    def _pick_chunks(self, atoms: Tensor, parts: list[Tensor]) -> None:
        cut = next((a for a in range(atoms.ndim) if parts[0].shape[a] != atoms.shape[a]), 0)
        for one, following in itertools.pairwise(parts):
            self.borders.cut(compact(one.narrow(cut, -1, 1)).numpy(), compact(following.narrow(cut, 0, 1)).numpy())
        first, *others = [compact(part) for part in parts]
        for part in others:
            if part.shape != first.shape:
                self.freeze(essential(atoms), "its chunks have unequal sizes")
            elif not torch.equal(part, first):
                self.atoms.unite(first.numpy(), part.numpy(), f"a chunk ({self.where_now})")


def _channels(label: Label, axis: int) -> np.ndarray:
    """Return the atoms along an axis, at the first index of all other axes."""
    atoms = known_atoms(label).movedim(axis, 0)
    return atoms[(slice(None), *[0] * (atoms.ndim - 1))].contiguous().numpy()


def _channel_axis(tensor: Tensor, wide: list[int]) -> int | None:
    """Guess the axis of a parameter that can grow.

    It knows vectors, tables (N, C) and (1, N, C), and maps (C, H, W) with or without a batch of one.
    """
    if not tensor.ndim:
        return None
    if len(wide) > 1:
        batch = tensor.ndim > 2 and tensor.shape[0] == 1
        return ({3: 2, 4: 1} if batch else {2: 1, 3: 0}).get(tensor.ndim)
    return wide[0] if wide else min(tensor.ndim - 1, 1)


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
            operands[i] = replace(operand, atoms=no_atoms((1,) * len(shape)), varies=set())
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

    def stretched(self, shape: Shape) -> set[int]:
        """Return the axes along which broadcasting to `shape` repeats it."""
        return {a for a, s in enumerate(shape) if self.size[a] == 1 and s > 1}

    def one_channel(self) -> bool:
        """Return whether it is a single channel that may grow."""
        return not self.varies and self.atoms.numel() > 0 and int(self.atoms.reshape(-1)[0]) != FIXED
