"""Union-find over channels: which channels must grow together, and which cannot grow.

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
            grown = 2 * self.size
            self.parent = np.concatenate([self.parent, np.zeros(grown - len(self.parent), dtype=np.int64)])
            self.reason = np.concatenate([self.reason, np.zeros(grown - len(self.reason), dtype=np.int64)])
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
