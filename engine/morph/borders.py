"""Where runs of one class end: copies of a run are laid out as wholes, so the same runs must be seen everywhere.

Channels of one class that lie side by side are copied as a whole (0 1 2 0 1 2). Where LayerNorm has made one class of
two concatenated maps, though, each map is copied by itself before they are concatenated, and whatever reads the result
has to be laid out likewise: the seam is a border of its runs, and of all that meets it.
"""

from __future__ import annotations

import numpy as np

from .atoms import FIXED, Atoms


class Borders:
    """Collects which neighbours met which; `find` then tells where the borders are."""

    def __init__(self, atoms: Atoms):
        self.atoms = atoms
        self.cuts: list[np.ndarray] = []  # (2, n): intervals of atoms with a border in them
        self.steps: list[np.ndarray] = []  # (4, n): two intervals each, of which both have borders or none

    def cut(self, last: np.ndarray, first: np.ndarray) -> None:
        """A border between neighbours: the end of one part and the start of the next."""
        low, high = np.minimum(last, first).reshape(-1), np.maximum(last, first).reshape(-1)
        inside = (low < high) & (low != FIXED) & (self._axis(low) == self._axis(high))
        self.cuts.append(np.stack([low, high])[:, inside])

    def meet(self, a: np.ndarray, b: np.ndarray) -> None:
        """Two arrays of atoms of one shape meet position by position: neighbours in one are neighbours in the other."""
        for axis in range(a.ndim):
            size = a.shape[axis]
            ends = [
                (x.take(range(size - 1), axis).reshape(-1), x.take(range(1, size), axis).reshape(-1)) for x in (a, b)
            ]
            self.step(ends[0], ends[1])

    def step(self, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> None:
        """`meet` for given pairs of neighbours: (left, right) of each array."""
        moving = (a[0] != a[1]) & (b[0] != b[1])  # a repeated channel has no neighbour to tell about
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
        """Of each atom, whether a run ends there; within classes only, they are borders anyway."""
        roots = self.atoms.roots(np.arange(self.atoms.size))
        border = np.zeros(self.atoms.size + 1, dtype=bool)
        for low, high in self.cuts:
            border[high[roots[low] == roots[high]] - 1] = True
        if not border.any() or not self.steps:
            return border
        steps = np.unique(np.concatenate(self.steps, 1), axis=1)
        steps = steps[:, (roots[steps[0]] == roots[steps[1]]) & (roots[steps[2]] == roots[steps[3]])]
        while True:  # every round adds a border
            before = np.concatenate([[0], np.cumsum(border)])
            in_a, in_b = before[steps[1]] > before[steps[0]], before[steps[3]] > before[steps[2]]
            if (in_a == in_b).all():
                return border
            border[steps[1, in_b & ~in_a] - 1] = True
            border[steps[3, in_a & ~in_b] - 1] = True

    def _axis(self, atoms: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.atoms.starts, atoms, side="right")

    def _seams(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Neighbours from two axes, or back to the front of one (unless all go backwards: that is a flip)."""
        other = self._axis(left) != self._axis(right)
        back = (right < left) & ~other
        return other | (back if (right > left)[~other].any() else np.zeros_like(back))
