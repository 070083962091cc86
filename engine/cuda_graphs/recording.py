"""Recordings: the work of equivalent tiles on graph buffers, which is run op by op, then captured and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor

from ...kernels.choice import current_mode
from ...kernels.precision import tf32_settings
from ..tiling.halos import Rect
from ..tiling.scan import Scan
from ..tiling.stage import TiledStage
from ..tiling.tile import Halos
from .buffers import Executor, GraphBuffers, Name, SharedBuffers, captured
from .signature import Outline

MOST_KINDS = 64  # kinds of tiles that are recorded; there are many if strides do not divide the tile
MOST_RECORDINGS = 4 * MOST_KINDS  # recordings per stage: both passes, and twice for other outputs or settings

Parts = Mapping[tuple[str, int], Rect]


def settings(scan: Scan) -> Hashable:
    """The settings under which work was captured."""
    return scan.device, scan.dtype, scan.autocast, scan.whole, switches()


def switches() -> Hashable:
    """The settings of the process that affect how ops are computed."""
    return (
        current_mode(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        tf32_settings(),
    )


class TileRecording(GraphBuffers):
    """The work of the tiles of one kind in one pass.

    Args:
        outline: the inputs and outputs of these tiles; the work computes the tile of the outline.
        work: computes the tile on the graph buffers.
        arena: the memory of the graph buffers.
    """

    def __init__(self, outline: Outline, work: Callable[[TileRecording], None], arena: SharedBuffers):
        super().__init__(arena)
        self.outline, self.i, self.j = outline, outline.i, outline.j
        self.run = partial(work, self)
        self.replay: Callable[[], None] | None = None
        self.seen = False

    def __call__(self, tensors: Mapping[Name, Tensor], executor: Executor) -> None:
        """Run, capture or replay the work on these inputs."""
        self.load(tensors)
        if self.seen and self.replay is None:
            self.replay = captured(executor, self.run) or self.run
        (self.replay or self.run)()
        self.seen = True

    def halos(self, kind: str, parts: Parts) -> Halos:
        """The inputs (kind, side, value) as halos, which contain only these parts."""
        here = Halos({}, {})
        for (side, value), rect in parts.items():
            tensor = self.inputs.get((kind, side, value))
            if tensor is not None:
                getattr(here, side)[value] = tensor
                top, _, left, _ = self.outline.place(side, value, rect, self.i, self.j)
                here.origin[side, value] = top, left
        return here

    def pixels(self, source: int, rect: Rect) -> Tensor:
        """A window of a source."""
        return self.inputs["window", source, self.outline.relative("source", source, rect)]


class RecordingPool:
    """The recordings under one set of settings, and the graph buffers that they share.

    Attributes:
        step: the buffers that all tiles of a pass share.
        sums: gradients of the vectors, summed over the tiles of pass 2.
    """

    def __init__(self, tiled: TiledStage, scan: Scan, arena: SharedBuffers):
        self.tiled, self.arena = tiled, arena
        # Not `scan`: that would keep its image alive.
        self.scan = Scan(tiled, {}, scan.device, scan.dtype, scan.autocast, whole=scan.whole)
        self.recordings: dict[Hashable, TileRecording] = {}
        self.step = GraphBuffers()
        self.sums: dict[int, Tensor] = {}

    def recording(self, i: int, j: int, key: Hashable, work: Callable[[TileRecording], None]) -> TileRecording:
        """The recording of a key, which is created for tile (i, j) if necessary."""
        if key not in self.recordings:
            while len(self.recordings) >= MOST_RECORDINGS:
                del self.recordings[next(iter(self.recordings))]  # the oldest
            self.recordings[key] = TileRecording(Outline(self.tiled, i, j, self.scan.taken), work, self.arena)
        return self.recordings[key]

    def vectors(self) -> dict[int, Tensor]:
        """The vectors as new tensors in the same memory, without autograd state of earlier runs."""
        return {v: self.step.inputs["vector", v].detach() for v in self.tiled.stage.vectors}
