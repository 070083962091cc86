"""First run, of the parent: numbers every value, unites the atoms that must grow together, and keeps a log.

Sound or not, what it unites or freezes only decides what is attempted: `Rebuild` checks every op by itself.
"""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .atoms import FIXED, Atoms
from .borders import Borders
from .lookup import Bags, Join, Rows, Table
from .provenance import Entry, Label, Tracer

Axis = tuple[str, int]  # parameter or buffer name, axis


class Discover(Tracer):
    """Labels with value numbers and atoms; what it learnt is in `log`, `atoms`, `axes` and `atom_of`."""

    def __init__(self, model: nn.Module, table: Table, groups: str = "more"):
        super().__init__(model, table)
        self.groups = groups
        self.has_groups = False  # some might get wider
        self.atoms = Atoms()
        self.borders = Borders(self.atoms)
        self.axes: dict[Axis, np.ndarray] = {}  # atoms of every parameter axis that might grow
        self.columns: dict[Axis, np.ndarray] = {}  # atoms that arrive at a linear op's input axis
        self.linear_names: set[str] = set()
        self.fixed: dict[str, str] = {}  # matrices that are read by other than linear ops
        self.log: list[Entry] = []
        self.constants: dict[bytes, int] = {}
        self.next_vid = 0
        self.blocks: list[Tensor] = []  # atom of every vid, in order
        self.input_vids: list[Tensor] = []
        # Sizes among an op's arguments, by the op's place in the log and the argument's name: the channels that they
        # go with, and (found by the second run) the module and attribute that they are from.
        self.sized: dict[tuple[int, str], np.ndarray] = {}
        self.sources: dict[tuple[int, str], tuple[str, str]] = {}
        self.shapes = {
            name: tuple(t.shape)
            for name, t in [
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            ]
        }

    # ---------------------------------------------------------------- numbers

    def number(self, atoms: Tensor) -> Tensor:
        """Fresh vids for values with these atoms."""
        vids = torch.arange(self.next_vid, self.next_vid + atoms.numel()).reshape(atoms.shape)
        self.next_vid += atoms.numel()
        self.blocks.append(atoms.reshape(-1))
        return vids

    def atom_of(self) -> Tensor:
        """The atom of every vid."""
        return torch.cat(self.blocks) if self.blocks else torch.zeros(0, dtype=torch.int64)

    def constant_vid(self, value: float) -> int:
        key = struct.pack("d", value)
        if key not in self.constants:
            self.constants[key] = int(self.number(torch.zeros(1, dtype=torch.int64)))
        return self.constants[key]

    def constant_label(self, tensor: Tensor) -> Label:
        values, inverse = torch.unique(tensor.detach().double().reshape(-1), return_inverse=True)
        vids = torch.tensor([self.constant_vid(v) for v in values.tolist()], dtype=torch.int64)
        return Label(vids[inverse].reshape(tensor.shape), torch.zeros((), dtype=torch.int64).expand(tensor.shape))

    def parameter_label(self, name: str, tensor: Tensor) -> Label:
        wide = [a for a in range(tensor.ndim) if tensor.shape[a] > 1]
        if name in self.linear_names:
            self._fix(name, f"{self.where_now} reads '{name}' as a whole")
            wide = [0, 1]
        atoms = torch.zeros((), dtype=torch.int64).expand(tensor.shape)
        axis = _channel_axis(tensor, wide)
        if axis is not None and name not in self.linear_names:
            self.axes[name, axis] = self.atoms.new(tensor.shape[axis])
            shape = [1] * tensor.ndim
            shape[axis] = -1
            atoms = torch.from_numpy(self.axes[name, axis]).reshape(shape).expand(tensor.shape)
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
        self.atoms.freeze(_compact(atoms) if isinstance(atoms, Tensor) else atoms, f"{why} ({self.where_now})")

    # ---------------------------------------------------------------- steps

    def elementwise(self, labels: list[Label]) -> Label:
        shape = torch.broadcast_shapes(*(label.vids.shape for label in labels))
        small = tuple(i for i, label in enumerate(labels) if label.vids.numel() < math.prod(shape))
        small = small if 2 <= len(small) < len(labels) else ()  # these are joined first, at their own small size
        self.log[-1].steps.append(small)
        if small:
            big = [label for i, label in enumerate(labels) if i not in small]
            labels = [*big, self.elementwise([labels[i] for i in small])]
        atoms = self._meet(labels, shape)
        vids = self.number(atoms)
        columns = [label.vids.expand(shape) for label in labels]
        join = Join(self.table, columns)
        self.log[-1].steps.append((join, int(vids.reshape(-1)[0]) if vids.numel() else 0))
        if join.main is None and vids.numel():  # equal operands make equal values
            vids = vids.reshape(-1)[join.find(columns)].reshape(shape)
        return Label(vids, atoms)

    def _meet(self, labels: list[Label], shape: tuple[int, ...]) -> Tensor:
        """Unite the atoms of broadcast operands; the atoms of the result."""
        ndim = len(shape)
        operands = []
        for label in labels:
            assert label.atoms is not None
            atoms = _compact(label.atoms)
            atoms = atoms.reshape((1,) * (ndim - atoms.ndim) + tuple(atoms.shape))
            size = (1,) * (ndim - label.vids.ndim) + tuple(label.vids.shape)
            varies = {a for a in range(ndim) if atoms.shape[a] > 1 and bool((atoms != atoms.narrow(a, 0, 1)).any())}
            operands.append((atoms, size, varies))
        # After a concatenation along the tokens only their meeting shows that all tokens have the same channels.
        operands.sort(key=lambda operand: len(operand[2]) > 1)
        why = "it meets a tensor of fixed size"
        main = set().union(*(v for _, _, v in operands))
        for atoms, size, varies in operands:
            stretched = {a for a in range(ndim) if size[a] == 1 and shape[a] > 1}
            alone = not varies and atoms.numel() and int(atoms.reshape(-1)[0]) != FIXED
            if alone and (stretched & main):
                self.freeze(atoms, "its one channel is broadcast")
        joined: Tensor | None = None
        for atoms, size, varies in operands:
            if any(size[a] == 1 and shape[a] > 1 for a in main):
                if varies:  # an outer product of two channel axes
                    for other, _, _ in operands:
                        self.freeze(other, "channels of two axes are multiplied")
                    return torch.zeros((), dtype=torch.int64).expand(shape)
                continue
            if not main and not bool((atoms != FIXED).any()):
                continue
            if joined is None:
                joined = atoms
                continue
            a, b = torch.broadcast_tensors(joined, atoms)
            self.atoms.unite(a.numpy(), b.numpy(), f"{why} ({self.where_now})")
            self.borders.meet(a.numpy(), b.numpy())
            joined = torch.where(a == FIXED, b, a)
        if joined is None:
            joined = torch.zeros((), dtype=torch.int64)
        return joined.expand(shape)

    def spread(self, label: Label, axes: list[int]) -> bool:
        found = self._varies(label, axes)
        self.log[-1].steps.append(found)
        return found

    def agree(self, values: list[Any]) -> None:
        self.log[-1].steps.append(values)

    def size(self, what: str, given: int, wanted: int, label: Label, axis: int) -> None:
        assert label.atoms is not None
        atoms = label.atoms.movedim(axis, 0)
        self.sized[len(self.log), what] = atoms[(slice(None), *[0] * (atoms.ndim - 1))].numpy()

    def _varies(self, label: Label, axes: list[int]) -> bool:
        assert label.atoms is not None
        atoms = _compact(label.atoms)
        return any(atoms.shape[a] > 1 and bool((atoms != atoms.narrow(a, 0, 1)).any()) for a in axes)

    def rows(self, label: Label, axes: list[int], outputs: list[tuple[int, ...]] | None, keeps: bool) -> list[Label]:
        assert label.atoms is not None and outputs is not None
        if self._varies(label, axes):
            self.freeze(label.atoms, "it is reduced over its channels")
            atoms = torch.zeros((), dtype=torch.int64).expand(label.vids.shape)
        else:
            atoms = label.atoms
        kept = [a for a in range(label.vids.ndim) if a not in axes]
        slabs = label.vids.permute(*kept, *axes).reshape(math.prod(label.vids.shape[a] for a in kept), -1)
        index = Rows(slabs)
        canonical = index.find(slabs)
        results, bases = [], []
        for shape in outputs:
            first = atoms
            for a in axes:
                first = first.narrow(a, 0, 1)
            if not keeps:
                first = first.reshape([first.shape[a] for a in kept])
            out_atoms = first.expand(shape)
            vids = self.number(out_atoms)
            base = int(vids.reshape(-1)[0]) if vids.numel() else 0
            results.append(Label(row_vids(canonical, base, shape, kept, axes, keeps, label.vids.shape), out_atoms))
            bases.append((base, shape))
        self.log[-1].steps.append((index, bases, axes, keeps))
        return results

    def statistic(self, label: Label, axes: list[int], extreme: bool) -> Label:
        assert label.atoms is not None
        kept = [a for a in range(label.vids.ndim) if a not in axes]
        order = [*kept, *axes]
        count = math.prod(label.vids.shape[a] for a in kept)
        slabs = label.vids.permute(order).reshape(count, -1)
        atoms = label.atoms.permute(order).reshape(count, -1)
        if bool((atoms != atoms[:1]).any()):  # rows of different channels
            groups = bool((self._roots(atoms) == self._roots(atoms[:, :1])).all())
            if extreme or not groups:
                if extreme:
                    self.freeze(atoms, "it is reduced over its channels in groups")
                else:
                    alike = atoms[:, :1].expand_as(atoms).numpy()
                    self.atoms.unite(atoms.numpy(), alike, f"a mean ({self.where_now})", statistic=True)
        elif not extreme:
            first = atoms[:1]
            alike = first[:, :1].expand_as(first).numpy()
            self.atoms.unite(first.numpy(), alike, f"a mean ({self.where_now})", statistic=True)
        shape = tuple(1 if a in axes else s for a, s in enumerate(label.vids.shape))
        out_atoms = torch.zeros((), dtype=torch.int64).expand(shape)
        vids = self.number(out_atoms)
        base = int(vids.reshape(-1)[0]) if vids.numel() else 0
        bags = Bags(slabs, extreme)
        self.log[-1].steps.append((bags, base, axes))
        return Label((base + bags.find(slabs)).reshape(shape), out_atoms)

    def _roots(self, atoms: Tensor) -> Tensor:
        return torch.from_numpy(self.atoms.roots(atoms.numpy()))

    def group_count(self, channels: int, groups: int) -> int:
        self.log[-1].steps.append(channels // groups)
        return groups

    def linear(self, name: str, label: Label, axis: int, kind: tuple[bool, int, tuple[int, ...]]) -> Label:
        transposed, groups, shape = kind
        assert label.atoms is not None
        axis %= label.vids.ndim
        others = [a for a in range(label.vids.ndim) if a != axis]
        if name in self.parameters:
            self._fix(name, f"{self.where_now} uses '{name}', which others read as a whole")
        self.linear_names.add(name)
        if self._varies(label, others) or name in self.fixed:
            why = self.fixed.get(name, "a linear op runs across its channels")
            self._fix(name, f"{why} ({self.where_now})")
            self.log[-1].steps.append(None)
            return self.barrier([label], [shape], why)[0]
        arriving = label.atoms
        for a in others:
            arriving = arriving.narrow(a, 0, 1)
        arriving_atoms = np.ascontiguousarray(arriving.reshape(-1).numpy())
        weight = self.shapes[name]
        rows_axis, columns_axis = (1, 0) if transposed else (0, 1)
        wider = False
        if groups == 1:
            if (name, rows_axis) not in self.axes:
                self.axes[name, rows_axis] = self.atoms.new(weight[rows_axis])
            seen = self.columns.setdefault((name, columns_axis), arriving_atoms)
            self.atoms.unite(seen, arriving_atoms, f"a shared weight also reads fixed channels ({self.where_now})")
            self.borders.meet(seen, arriving_atoms)
            rows = self.axes[name, rows_axis]
        else:
            self.size("groups", groups, groups, label, axis)
            if (name, 0) not in self.axes:
                self.axes[name, 0] = self.atoms.new(weight[0])
            why = f"a grouped convolution reads fixed channels ({self.where_now})"
            own, inside = self.axes[name, 0].reshape(groups, -1), arriving_atoms.reshape(groups, -1)
            self.has_groups |= inside.shape[1] > 1 and not transposed
            wider = self.groups == "wider" and inside.shape[1] > 1 and not transposed
            rows = self.axes[name, 0]
            if wider:  # the same places of all groups are copied alike, within their group
                seen = self.columns.setdefault((name, columns_axis), inside[0])
                self.atoms.unite(seen, inside[0], why)
                for part in (own, inside):
                    self.atoms.unite(np.broadcast_to(part[:1], part.shape), part, why)
                    self.borders.cut(part[:-1, -1], part[1:, 0])
            else:
                first = inside[:, :1]
                self.atoms.unite(np.broadcast_to(first, own.shape), own, why)
                self.atoms.unite(np.broadcast_to(first, inside.shape), inside, why)
                self.borders.step((inside[:-1, -1], inside[1:, 0]), (own[:-1, -1], own[1:, 0]))
                rows = np.repeat(first.reshape(-1), weight[1]) if transposed else rows
        view = [1] * label.vids.ndim
        view[axis] = -1
        atoms = torch.from_numpy(rows).reshape(view).expand(shape)
        vids = self.number(atoms)
        slabs = label.vids.movedim(axis, 0).reshape(label.vids.shape[axis], -1)
        self.log[-1].steps.append((slabs, Rows(slabs), vids.movedim(axis, 0), groups, wider))
        return Label(vids, atoms)

    def barrier(self, labels: list[Label], outputs: list[tuple[int, ...]], why: str) -> list[Label]:
        for label in labels:
            assert label.atoms is not None
            self.freeze(label.atoms, why)
            if label.parameter is not None:
                self._fix(label.parameter, f"{why} ({self.where_now})")
        results = []
        for shape in outputs:
            atoms = torch.zeros((), dtype=torch.int64).expand(shape)
            results.append(Label(self.number(atoms), atoms))
        self.log[-1].steps.append(([label.vids for label in labels], [label.vids for label in results], why))
        return results

    def pick(self, name: str, label: Label, results: list[Label]) -> None:
        assert label.atoms is not None
        atoms = _essential(label.atoms)
        if name in ("chunk", "unsafe_chunk"):
            parts = [r.atoms for r in results if r.atoms is not None]
            cut = next((a for a in range(atoms.ndim) if parts[0].shape[a] != label.atoms.shape[a]), 0)
            for one, following in itertools.pairwise(parts):
                self.borders.cut(
                    _compact(one.narrow(cut, -1, 1)).numpy(), _compact(following.narrow(cut, 0, 1)).numpy()
                )
            parts = [_compact(part) for part in parts]
            for part in parts[1:]:
                if part.shape == parts[0].shape:
                    if not torch.equal(part, parts[0]):
                        self.atoms.unite(parts[0].numpy(), part.numpy(), f"a chunk ({self.where_now})")
                else:
                    self.freeze(atoms, "its chunks are of unequal size")
            return
        before = np.unique(atoms.numpy())
        for result in results:
            assert result.atoms is not None
            now = _essential(result.atoms)
            if not np.array_equal(np.unique(now.numpy()), before) or (now.numel() != atoms.numel() and len(before) > 1):
                self.freeze(atoms, "it is cut or repeated at fixed indices")
                return


def row_vids(
    at: Tensor,
    base: int,
    old: tuple[int, ...],
    kept: list[int],
    axes: list[int],
    keeps: bool,
    shape: tuple[int, ...] | torch.Size,
) -> Tensor:
    """Vids of the output of a row op, given the parent's row of each row (FREE stays).

    Args:
        at: parent's row for each row, (K').
        base: first vid of the parent's output.
        old: shape of the parent's output.
        kept: the input's axes that are not reduced.
        axes: the input's axes that are.
        keeps: whether the output has them.
        shape: of the input of this run.
    """
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


def _channel_axis(tensor: Tensor, wide: list[int]) -> int | None:
    """The axis of a parameter that can grow: of vectors, and of embeddings (1, N, C) and (1, C, H, W)."""
    if not tensor.ndim:
        return None
    if len(wide) > 1:
        return {3: 2, 4: 1}.get(tensor.ndim) if tensor.shape[0] == 1 else None
    return wide[0] if wide else min(tensor.ndim - 1, 1)


def _compact(atoms: Tensor) -> Tensor:
    """Without the repeats of expanded axes: those get size 1."""
    for axis in range(atoms.ndim):
        if atoms.stride(axis) == 0 and atoms.shape[axis] > 1:
            atoms = atoms.narrow(axis, 0, 1)
    return atoms


def _essential(atoms: Tensor) -> Tensor:
    """Without the axes along which nothing changes: those get size 1."""
    atoms = _compact(atoms)
    for axis in range(atoms.ndim):
        if atoms.shape[axis] > 1 and bool((atoms == atoms.narrow(axis, 0, 1)).all()):
            atoms = atoms.narrow(axis, 0, 1)
    return atoms
