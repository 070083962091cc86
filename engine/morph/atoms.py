"""Union-find over channels: which of them can only grow together, and which cannot grow at all.

An atom is one index of one parameter axis, e.g. row 5 of `conv1.weight`. Atoms that meet in an op are united: they
are copied equally often. Atom 0 stands for a fixed size (pixels, constants): whatever is united with it is frozen.
"""

from __future__ import annotations

import copy

import numpy as np
from torch import Tensor

FIXED = 0


class Atoms:
    """Numpy arrays `parent` and `reason` (index into `reasons`, 0 = not frozen), grown by doubling."""

    def __init__(self) -> None:
        self.size = 1
        self.starts = [0]  # first atom of each axis
        self.parent = np.zeros(1024, dtype=np.int64)
        self.reason = np.zeros(1024, dtype=np.int64)
        self.reasons = ["", "its size is fixed"]
        self.reason[FIXED] = 1
        self.fine: Atoms | None = None  # the same without what statistics over channels unite, if that is anything

    def new(self, count: int) -> np.ndarray:
        """`count` fresh atoms, each alone."""
        if self.fine is not None:
            self.fine.new(count)
        start, self.size = self.size, self.size + count
        self.starts.append(start)
        if self.size > len(self.parent):
            grown = 2 * self.size
            self.parent = np.concatenate([self.parent, np.zeros(grown - len(self.parent), dtype=np.int64)])
            self.reason = np.concatenate([self.reason, np.zeros(grown - len(self.reason), dtype=np.int64)])
        fresh = np.arange(start, self.size)
        self.parent[fresh] = fresh
        return fresh

    def roots(self, atoms: np.ndarray | Tensor) -> np.ndarray:
        """The class of each atom, named by its root."""
        root = self.parent[np.asarray(atoms)]
        while True:
            above = self.parent[root]
            if np.array_equal(above, root):
                return root
            root = above

    def frozen(self, root: int) -> str:
        """Why the class cannot grow; empty if it can."""
        return self.reasons[self.reason[root]]

    def freeze(self, atoms: np.ndarray | Tensor, why: str) -> None:
        """Freeze the classes of these atoms, unless they are frozen already."""
        roots = np.unique(self.roots(np.unique(np.asarray(atoms))))
        roots = roots[self.reason[roots] == 0]
        if len(roots):
            self.reasons.append(why)
            self.reason[roots] = len(self.reasons) - 1

    def channels(self, atoms: np.ndarray) -> np.ndarray:
        """Finer classes: of the channels that are one and the same, not of those that only count together."""
        return (self.fine or self).roots(atoms)

    def unite(self, first: np.ndarray | Tensor, second: np.ndarray | Tensor, why: str, statistic: bool = False) -> None:
        """Unite two arrays of atoms position by position; `why` is the reason where one of them is FIXED.

        `statistic`: they are other channels, of which only the counts have to be equal.
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
        keep = (a != b) & (a != FIXED) & (b != FIXED)
        if not keep.any():
            return
        a, b = np.divmod(np.unique(a[keep] * self.size + b[keep]), self.size)  # each pair once, as one number
        if len(np.unique(b)) == len(b) and not np.isin(a, b).any():  # each b is hung below an a that stays a root
            self._hang(b, a)
            return
        for x, y in zip(a, b, strict=True):
            rx, ry = self.roots(np.array([x, y]))
            if rx != ry:
                self._hang(np.array([max(rx, ry)]), np.array([min(rx, ry)]))

    def _hang(self, below: np.ndarray, above: np.ndarray) -> None:
        self.parent[below] = above
        passed = (self.reason[below] != 0) & (self.reason[above] == 0)
        self.reason[above[passed]] = self.reason[below[passed]]
