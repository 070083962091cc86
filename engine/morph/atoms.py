"""Channels: which must grow together, which cannot grow, and the borders between runs that are copied as a block.

An atom is one index of one parameter axis, e.g. row 5 of `conv1.weight`. Atoms that meet in an op are united: all of
them get the same number of copies. Atom 0 represents a fixed size (pixels, constants); atoms united with it are frozen.
"""

from __future__ import annotations

import copy

import numpy as np
from torch import Tensor

FIXED = 0


class Atoms:
    """Union-find in NumPy arrays `parent` and `reason` (index into `reasons`, 0 = not frozen) that grow by doubling."""

    def __init__(self) -> None:
        self.size = 1
        self.starts = [0]  # first atom of each axis
        self.parent = np.zeros(1024, dtype=np.int64)
        self.reason = np.zeros(1024, dtype=np.int64)
        self.reasons = ["", "its size is fixed"]
        self.reason[FIXED] = 1
        self.fine: Atoms | None = None  # the same without the unions by statistics over channels; None without any

    def new(self, count: int) -> np.ndarray:
        """Create `count` atoms, each in its own class."""
        if self.fine is not None:
            self.fine.new(count)
        start, self.size = self.size, self.size + count
        self.starts.append(start)
        if self.size > len(self.parent):
            self.parent, self.reason = (np.pad(a, (0, 2 * self.size - len(a))) for a in (self.parent, self.reason))
        fresh = np.arange(start, self.size)
        self.parent[fresh] = fresh
        return fresh

    def roots(self, atoms: np.ndarray | Tensor) -> np.ndarray:
        """Return the root of each atom, which identifies its class."""
        root = self.parent[np.asarray(atoms)]
        while True:
            above = self.parent[root]
            if np.array_equal(above, root):
                return root
            root = above

    def frozen(self, root: int) -> str:
        """Return why the class cannot grow; empty if it can."""
        return self.reasons[self.reason[root]]

    def freeze(self, atoms: np.ndarray | Tensor, why: str) -> None:
        """Freeze the classes of these atoms that are not frozen yet."""
        roots = np.unique(self.roots(np.unique(np.asarray(atoms))))
        roots = roots[self.reason[roots] == 0]
        if len(roots):
            self.reasons.append(why)
            self.reason[roots] = len(self.reasons) - 1

    def channels(self, atoms: np.ndarray) -> np.ndarray:
        """Return the finer classes: channels that are copies of each other, not those that only need equal counts."""
        return (self.fine or self).roots(atoms)

    def unite(self, first: np.ndarray | Tensor, second: np.ndarray | Tensor, why: str, statistic: bool = False) -> None:
        """Unite two arrays of atoms elementwise; `why` is the reason for a freeze where one of them is FIXED.

        With `statistic` the two are different channels that only need equal counts.
        """
        if statistic and self.fine is None:
            self.fine = copy.deepcopy(self)
        elif not statistic and self.fine is not None:
            self.fine.unite(first, second, why)
        a, b = self.roots(np.asarray(first).reshape(-1)), self.roots(np.asarray(second).reshape(-1))
        for one, other in ((a, b), (b, a)):
            fixed = one == FIXED
            if fixed.any():
                self.freeze(other[fixed], why)
        mask = (a != b) & (a != FIXED) & (b != FIXED)
        if not mask.any():
            return
        a, b = np.divmod(np.unique(a[mask] * self.size + b[mask]), self.size)  # encode each pair as one number
        if len(np.unique(b)) == len(b) and not np.isin(a, b).any():  # each b gets one parent, which stays a root
            self._attach(b, a)
            return
        for x, y in zip(a, b, strict=True):
            rx, ry = self.roots(np.array([x, y]))
            if rx != ry:
                self._attach(np.array([max(rx, ry)]), np.array([min(rx, ry)]))

    def _attach(self, below: np.ndarray, above: np.ndarray) -> None:
        self.parent[below] = above
        inherits = (self.reason[below] != 0) & (self.reason[above] == 0)
        self.reason[above[inherits]] = self.reason[below[inherits]]


class Borders:
    """Borders between runs of channels of one class; it collects pairs of adjacent channels that meet in ops.

    Adjacent channels of one class are copied as a block (0 1 2 0 1 2). If LayerNorm unites two concatenated maps into
    one class, each map is copied separately before the concatenation, and every reader needs that layout. So the seam
    between the maps is a border of the runs, in every tensor that meets them.
    """

    def __init__(self, atoms: Atoms):
        self.atoms = atoms
        self.cuts: list[np.ndarray] = []  # (2, n): intervals of atoms that contain a border
        self.steps: list[np.ndarray] = []  # (4, n): pairs of intervals; both contain a border, or neither

    def cut(self, last: np.ndarray, first: np.ndarray) -> None:
        """Add borders between neighbours: `last` ends one part, `first` starts the next."""
        low, high = np.minimum(last, first).reshape(-1), np.maximum(last, first).reshape(-1)
        inside = (low < high) & (low != FIXED) & (self._axis(low) == self._axis(high))
        self.cuts.append(np.stack([low, high])[:, inside])

    def meet(self, a: np.ndarray, b: np.ndarray) -> None:
        """Record that two arrays of atoms of one shape meet elementwise, so they have the same neighbours."""
        for axis in range(a.ndim):
            size = a.shape[axis]
            ends = [
                (x.take(range(size - 1), axis).reshape(-1), x.take(range(1, size), axis).reshape(-1)) for x in (a, b)
            ]
            self.step(ends[0], ends[1])

    def step(self, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> None:
        """Do the same as `meet` for given pairs of neighbours, (left, right) of each array."""
        moving = (a[0] != a[1]) & (b[0] != b[1])  # a repeated channel adds no information
        for left, right in (a, b):
            moving &= (left != FIXED) & (right != FIXED)
        if not moving.any():
            return
        a, b = (a[0][moving], a[1][moving]), (b[0][moving], b[1][moving])
        seam_a, seam_b = self._seams(*a), self._seams(*b)
        self.cut(b[0][seam_a & ~seam_b], b[1][seam_a & ~seam_b])
        self.cut(a[0][seam_b & ~seam_a], a[1][seam_b & ~seam_a])
        both = ~seam_a & ~seam_b
        pairs = np.stack([np.minimum(*a), np.maximum(*a), np.minimum(*b), np.maximum(*b)])[:, both]
        pairs = pairs[:, (pairs[:2] != pairs[2:]).any(0)]
        if pairs.size:
            self.steps.append(np.unique(pairs, axis=1))

    def find(self) -> np.ndarray:
        """Return for each atom whether a run ends there; boundaries between classes are not included."""
        roots = self.atoms.roots(np.arange(self.atoms.size))
        border = np.zeros(self.atoms.size + 1, dtype=bool)
        for low, high in self.cuts:
            border[high[roots[low] == roots[high]] - 1] = True
        if not border.any() or not self.steps:
            return border
        steps = np.unique(np.concatenate(self.steps, 1), axis=1)
        steps = steps[:, (roots[steps[0]] == roots[steps[1]]) & (roots[steps[2]] == roots[steps[3]])]
        while True:  # terminates, because every round adds a border
            before = np.concatenate([[0], np.cumsum(border)])
            in_a, in_b = before[steps[1]] > before[steps[0]], before[steps[3]] > before[steps[2]]
            if (in_a == in_b).all():
                return border
            border[steps[1, in_b & ~in_a] - 1] = True
            border[steps[3, in_a & ~in_b] - 1] = True

    def _axis(self, atoms: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.atoms.starts, atoms, side="right")

    def _seams(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return where neighbours come from two axes, or jump back on one axis; if all go backwards it is a flip."""
        other = self._axis(left) != self._axis(right)
        back = (right < left) & ~other
        return other | (back if (right > left)[~other].any() else np.zeros_like(back))
