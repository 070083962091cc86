"""Tiles that are alike are captured once and replayed: the host then only copies, and runs no Python op by op.

A tile is computed on graph buffers, always at the same addresses:

    copy in    source windows, halos and, in pass 2, gradients of what the tile gives and the halos' own so far
    replay     the code of `Scan` and `Tile`, for the first tile of its kind (`signature.py`)
    copy out   halos handed on, shares of reductions, stored blocks; in pass 2 gradients

What is the same for all tiles (vectors, gradients of reductions) is copied in once per pass; gradients of vectors are
summed in graph buffers. The first tile of a kind runs on the graph buffers as it stands: that makes those it writes
to, measures and compiles kernels, warms libraries up. The second is captured. Recordings are kept across steps.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping

from torch import Tensor

from ..tiling.halos import Rect, area
from ..tiling.record import PassState
from ..tiling.reduce import Consumers
from ..tiling.scan import Scan
from ..tiling.stage import TiledStage
from .buffers import Arena, Executor
from .recording import MOST_KINDS, Bench, settings
from .signature import Outline, Signature, axis_signature, translates
from .tile_passes import Kind, ReplayedBackward, ReplayedForward


class Replays:
    """The recordings of one stage; the `Replay` of its scans. Stages of one network share an arena."""

    def __init__(self, tiled: TiledStage, executor: Executor, arena: Arena):
        self.tiled, self.executor, self.arena = tiled, executor, arena
        self.benches: dict[Hashable, Bench] = {}
        self.rows, self.cols = (_first_alike(tiled, axis) for axis in (0, 1))
        counts = kinds(self.rows, self.cols)
        self.recorded = {kind for kind, _ in counts.most_common(MOST_KINDS)}

    def kind(self, i: int, j: int) -> Kind | None:
        """The kind of a tile that is replayed."""
        kind = (self.rows[i], self.cols[j])
        return kind if kind in self.recorded else None  # pyright: ignore[reportReturnType]

    def _bench(self, scan: Scan, vectors: Mapping[int, Tensor]) -> Bench | None:
        if not self.recorded or any(vector.device.type != scan.device.type for vector in vectors.values()):
            return None  # a number on the host would be captured as it is now
        key = settings(scan)
        if key not in self.benches:
            self.benches.clear()  # other settings: what was recorded under the former ones is as large as this will be
            self.benches[key] = Bench(self.tiled, scan, self.arena)
        return self.benches[key]

    def forward(self, scan: Scan, vectors: Mapping[int, Tensor]) -> ReplayedForward | None:
        """Pass 1 of a step."""
        bench = self._bench(scan, vectors)
        return None if bench is None else ReplayedForward(bench, self.kind, self.executor, vectors)

    def backward(
        self, scan: Scan, kept: PassState, consumers: Consumers, stored: Mapping[int, Tensor]
    ) -> ReplayedBackward | None:
        """Pass 2 of a step."""
        bench = self._bench(scan, kept.vectors)
        if bench is None:
            return None
        return ReplayedBackward(bench, self.kind, self.executor, kept, consumers, stored)


def _first_alike(tiled: TiledStage, axis: int) -> list[int | None]:
    """For each row (column) of tiles the first one like it; None for those that cannot be replayed."""
    steps = (tiled.rows, tiled.cols)[axis].steps
    first: dict[Signature, int] = {}
    signatures = [axis_signature(tiled, axis, step) if translates(tiled) else None for step in range(steps)]
    return [None if s is None else first.setdefault(s, step) for step, s in enumerate(signatures)]


def kinds(rows: list[int | None], cols: list[int | None]) -> Counter[Kind]:
    """How many tiles there are of each kind."""
    both = itertools.product(Counter(rows).items(), Counter(cols).items())
    return Counter({(i, j): m * n for (i, m), (j, n) in both if i is not None and j is not None})


def buffer_bytes(tiled: TiledStage, training: bool) -> int:
    """What the graph buffers of a stage's tile in the middle take; 0 if it cannot be replayed.

    The vectors and the sums of their gradients, which all tiles share, are not included.
    """
    if not translates(tiled):
        return 0
    values, maps = tiled.stage.program.values, tiled.stage.maps

    def size(value: int, rect: Rect) -> int:
        height, width = maps.size(value)
        return area(rect) * math.prod(values[value].shape) // (height * width) * values[value].dtype.itemsize

    i, j = tiled.rows.steps // 2, tiled.cols.steps // 2
    outline = Outline(tiled, i, j, {*tiled.reductions, *tiled.stage.stored})
    windows = sum(size(source, rect) for source, rect in outline.windows)
    entering = sum(size(value, rect) for (_, value), rect in outline.entering.items())
    leaving = sum(size(value, rect) for (_, value), rect in outline.leaving.items())
    stored = sum(size(value, tiled.block(value, i, j)) for value in tiled.stage.stored)
    return (2 if training else 1) * (windows + entering + stored) + leaving
