"""Captures equivalent tiles once and replays them, so that the host only copies and runs no ops.

A tile is computed on graph buffers, always at the same addresses:

    copy in    source windows, halos and, in pass 2, gradients of the tile's results and of its halos so far
    replay     the code of `Scan` and `Tile`, for the first tile of its kind (`signature.py`)
    copy out   outgoing halos, shares of reductions, stored blocks; in pass 2 gradients

Inputs that all tiles share (vectors, gradients of reductions) are copied once per pass; gradients of vectors are summed
in graph buffers. The first tile of a kind runs op by op on the graph buffers, which allocates its outputs, tunes and
compiles kernels, and warms up libraries. The second is captured. Recordings remain across steps.
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
from .buffers import Executor, SharedBuffers
from .recording import MOST_KINDS, RecordingPool, settings
from .signature import Outline, Signature, axis_signature, translates
from .tile_passes import Kind, ReplayedBackward, ReplayedForward


class Replays:
    """The recordings of one stage, which implement `Replay` for its scans. Stages of a network share an arena."""

    def __init__(self, tiled: TiledStage, executor: Executor, arena: SharedBuffers):
        self.tiled, self.executor, self.arena = tiled, executor, arena
        self.benches: dict[Hashable, RecordingPool] = {}
        self.rows, self.cols = (_first_alike(tiled, axis) for axis in (0, 1))
        counts = kinds(self.rows, self.cols)
        self.recorded = {kind for kind, _ in counts.most_common(MOST_KINDS)}

    def kind(self, i: int, j: int) -> Kind | None:
        """The kind of a tile; None if the tile is not replayed."""
        kind = (self.rows[i], self.cols[j])
        return kind if kind in self.recorded else None  # pyright: ignore[reportReturnType]

    def _bench(self, scan: Scan, vectors: Mapping[int, Tensor]) -> RecordingPool | None:
        if not self.recorded or any(vector.device.type != scan.device.type for vector in vectors.values()):
            return None  # the value of a host tensor would be captured as a constant
        key = settings(scan)
        if key not in self.benches:
            self.benches.clear()  # frees the recordings of other settings, which are as large as the new ones
            self.benches[key] = RecordingPool(self.tiled, scan, self.arena)
        return self.benches[key]

    def forward(self, scan: Scan, vectors: Mapping[int, Tensor]) -> ReplayedForward | None:
        """The replay of pass 1 of a step; None if it cannot be replayed."""
        bench = self._bench(scan, vectors)
        return None if bench is None else ReplayedForward(bench, self.kind, self.executor, vectors)

    def backward(
        self, scan: Scan, kept: PassState, consumers: Consumers, stored: Mapping[int, Tensor]
    ) -> ReplayedBackward | None:
        """The replay of pass 2 of a step; None if it cannot be replayed."""
        bench = self._bench(scan, kept.vectors)
        if bench is None:
            return None
        return ReplayedBackward(bench, self.kind, self.executor, kept, consumers, stored)


def _first_alike(tiled: TiledStage, axis: int) -> list[int | None]:
    """For each row (column) of tiles the first equivalent one; None for those that cannot be replayed."""
    steps = (tiled.rows, tiled.cols)[axis].steps
    first: dict[Signature, int] = {}
    signatures = [axis_signature(tiled, axis, step) if translates(tiled) else None for step in range(steps)]
    return [None if s is None else first.setdefault(s, step) for step, s in enumerate(signatures)]


def kinds(rows: list[int | None], cols: list[int | None]) -> Counter[Kind]:
    """The number of tiles of each kind."""
    both = itertools.product(Counter(rows).items(), Counter(cols).items())
    return Counter({(i, j): m * n for (i, m), (j, n) in both if i is not None and j is not None})


def buffer_bytes(tiled: TiledStage, training: bool) -> int:
    """Bytes of the graph buffers of the stage's middle tile; 0 if it cannot be replayed.

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
