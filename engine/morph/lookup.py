"""Lookup of new values among old ones: elements by value number, rows by hashes that are then compared in full.

A value number (vid) identifies one scalar that the parent computes. An element of the child carries the vid of the
value that it equals, or FREE. Every lookup ends with a comparison, so hash collisions and stale entries do no harm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FREE = -1  # vid of an element that is not a copy
MISSING = -2  # position of a value that was not found


class PositionTable:
    """Scratch array from vid to position, shared by all lookups; entries of earlier lookups are harmless."""

    def __init__(self) -> None:
        self.data = torch.zeros(1 << 16, dtype=torch.int64)

    def find(self, old: Tensor, new: Tensor) -> Tensor:
        """Return a canonical position in `old` (n) of each element of `new` (m), or MISSING; FREE stays FREE."""
        if old.numel() == 0:
            return torch.full_like(new, MISSING)
        top = int(max(old.max(), new.max() if new.numel() else 0)) + 1
        if top > self.data.numel():
            self.data = torch.zeros(2 * top, dtype=torch.int64)
        known = old >= 0
        self.data[old[known] if not known.all() else old] = torch.arange(old.numel())[known]
        at = self.data[new.clamp(min=0)].clamp(max=old.numel() - 1)
        at = torch.where(old[at] == new, at, MISSING)
        return torch.where(new == FREE, FREE, at)


class Join:
    """Positions of tuples of vids, which identify the results of an elementwise op of several operands."""

    def __init__(self, table: PositionTable, columns: list[Tensor]):
        """Index `columns`, one vid tensor per operand, all of the output's shape (expanded views are allowed)."""
        self.table = table
        self.columns = columns
        self.main: int | None = None  # an operand with distinct values, which alone determines the position
        self.first: int | None = None  # its first value, if its values count up by one, as new vids do
        n = columns[0].numel()
        distinct = [i for i, c in enumerate(columns) if _storage_size(c) == n > 0]
        for i in distinct:
            flat = columns[i].reshape(-1)
            first = int(flat[0])
            if int(flat[-1]) - first == n - 1 and torch.equal(flat, torch.arange(first, first + n)):
                self.main, self.first = i, first
                return
        for i in distinct:
            flat = columns[i].reshape(-1)
            if bool((table.find(flat, flat) == torch.arange(n)).all()):
                self.main = i
                return

    def find(self, columns: list[Tensor]) -> Tensor:
        """Return the position (m) in the old output of each new element; FREE if an operand is FREE, else MISSING."""
        new = [c.reshape(-1) for c in columns]
        main = self.main
        if main is None:
            at = self._find_tuples([c.reshape(-1) for c in self.columns], new)
        elif self.first is not None:
            at = new[main] - self.first
            at = torch.where((at < 0) | (at >= self.columns[main].numel()), MISSING, at)
            at = torch.where(new[main] == FREE, FREE, at)
        else:
            at = self.table.find(self.columns[main].reshape(-1), new[main])
        others = [(o.reshape(-1), c) for i, (o, c) in enumerate(zip(self.columns, new, strict=True)) if i != main]
        safe = at.clamp(min=0) if others else at
        for o, c in others:
            at = torch.where((at >= 0) & (o[safe] != c), MISSING, at)
        for _, c in others:
            at = torch.where(c == FREE, FREE, at)
        return at

    def _find_tuples(self, old: list[Tensor], new: list[Tensor]) -> Tensor:
        n = old[0].numel()
        old_rank, new_rank = self.table.find(old[0], old[0]), self.table.find(old[0], new[0])
        for o, c in zip(old[1:], new[1:], strict=True):
            keys = old_rank * n + self.table.find(o, o)
            unique, old_rank = torch.unique(keys, return_inverse=True)
            second = self.table.find(o, c)
            wanted = torch.where((new_rank >= 0) & (second >= 0), new_rank * n + second, MISSING)
            at = torch.searchsorted(unique, wanted).clamp(max=unique.numel() - 1)
            new_rank = torch.where(unique[at] == wanted, at, MISSING)
        first = torch.zeros(n, dtype=torch.int64)
        first[old_rank] = torch.arange(n)
        return torch.where(new_rank >= 0, first[new_rank.clamp(min=0)], MISSING)


class SlabRows:
    """Positions of rows of vids (K, M), which identify the results of an op that reads whole slabs."""

    def __init__(self, rows: Tensor):
        self.rows = rows
        generator = torch.Generator().manual_seed(rows.shape[1])
        limits = torch.iinfo(torch.int64)
        self.weights = torch.randint(limits.min, limits.max, (rows.shape[1],), generator=generator) | 1
        self.hashes, self.order = (rows * self.weights).sum(1).sort(stable=True)

    def find(self, rows: Tensor) -> Tensor:
        """Return the first equal old row of each new row; FREE if one of its elements is FREE, else MISSING."""
        if rows.shape[1] != self.rows.shape[1] or not len(self.rows):
            return torch.full((len(rows),), MISSING)
        hashes = (rows * self.weights).sum(1)
        at = self.order[torch.searchsorted(self.hashes, hashes).clamp(max=len(self.order) - 1)]
        at = torch.where((self.rows[at] == rows).all(1), at, MISSING)
        return torch.where((rows == FREE).any(1), FREE, at)


class Bags:
    """Positions of rows of vids (K, M) by content: the same values in the same proportions, or only the same values.

    A mean is preserved if all of its values are copied equally often; an extreme is preserved by any copies.
    """

    def __init__(self, rows: Tensor, extreme: bool):
        self.rows = rows.sort(1).values
        self.extreme = extreme

    def find(self, rows: Tensor) -> Tensor:
        """Return the first equal old row of each new row (K', M') without FREE; MISSING if there is none."""
        old, new = self.rows, rows.sort(1).values
        if not (old.numel() and new.numel()):
            return torch.full((len(new),), MISSING)
        if self.extreme:
            old, new = _distinct(old), _distinct(new)
            width = max(old.shape[1], new.shape[1])
            old, new = (torch.cat([r[:, :1].expand(-1, width - r.shape[1]), r], 1) for r in (old, new))
        else:
            common = math.gcd(old.shape[1], new.shape[1])
            old, new = (_thinned(r, r.shape[1] // common, mark) for r, mark in ((old, -3), (new, -4)))  # marks differ
        return SlabRows(old).find(new)


def _distinct(rows: Tensor) -> Tensor:
    """Return sorted rows with each value once, filled up with the smallest value."""
    repeated = torch.nn.functional.pad(rows[:, 1:] == rows[:, :-1], (1, 0))
    return torch.where(repeated, rows[:, :1], rows).sort(1).values


def _thinned(rows: Tensor, times: int, otherwise: int) -> Tensor:
    """Return every `times`-th sorted value if all values occur in multiples of `times`, else a row of `otherwise`."""
    parts = rows.reshape(len(rows), -1, times)
    return parts[..., 0].where((parts == parts[..., :1]).flatten(1).all(1, keepdim=True), otherwise)


def _storage_size(tensor: Tensor) -> int:
    """Return the number of elements, without those that an expanded view repeats."""
    return math.prod(length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
