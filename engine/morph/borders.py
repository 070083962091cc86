"""Borders between runs of channels of one class: each run is copied as a block, so all tensors need the same runs.

Adjacent channels of one class are copied as a block (0 1 2 0 1 2). If LayerNorm unites two concatenated maps into one
class, each map is copied separately before the concatenation, and every reader needs that layout. So the seam between
the maps is a border of the runs, in every tensor that meets them.
"""

from __future__ import annotations

import numpy as np

from .atoms import FIXED, Atoms


class Borders:
    """Collects pairs of adjacent channels that meet in ops; `find` computes the borders from them."""

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
