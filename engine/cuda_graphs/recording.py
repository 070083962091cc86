"""The work of tiles that are alike, on graph buffers: done as it stands, captured, and replayed."""

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
from .buffers import Arena, Executor, GraphBuffers, Name, captured
from .signature import Outline

MOST_KINDS = 64  # of tiles that are recorded; where strides do not divide the tile there are many
MOST_RECORDINGS = 4 * MOST_KINDS  # kept of a stage: both passes, and as many again for other outputs or settings

Parts = Mapping[tuple[str, int], Rect]


def settings(scan: Scan) -> Hashable:
    """What captured work was captured under."""
    return scan.device, scan.dtype, scan.autocast, scan.whole, switches()


def switches() -> Hashable:
    """The settings of the process that say how ops are computed."""
    return (
        current_mode(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        tf32_settings(),
    )


class Recording(GraphBuffers):
    """The work of the tiles of one kind in one pass.

    Args:
        outline: what these tiles take and give; its tile is where the work believes itself to be.
        work: computes the tile on the graph buffers.
        arena: where these lie.
    """

    def __init__(self, outline: Outline, work: Callable[[Recording], None], arena: Arena):
        super().__init__(arena)
        self.outline, self.i, self.j = outline, outline.i, outline.j
        self.run = partial(work, self)
        self.replay: Callable[[], None] | None = None
        self.seen = False

    def __call__(self, tensors: Mapping[Name, Tensor], executor: Executor) -> None:
        """Do the work on these inputs."""
        self.load(tensors)
        if self.seen and self.replay is None:
            self.replay = captured(executor, self.run) or self.run
        (self.replay or self.run)()
        self.seen = True

    def halos(self, kind: str, parts: Parts) -> Halos:
        """The inputs (kind, side, value), as halos of which only these parts are here."""
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


class Bench:
    """The recordings made under one set of settings, and the graph buffers that they share.

    Attributes:
        step: what is the same for all tiles of a pass.
        sums: gradients of the vectors, summed over the tiles of pass 2.
    """

    def __init__(self, tiled: TiledStage, scan: Scan, arena: Arena):
        self.tiled, self.arena = tiled, arena
        # Not `scan`: that would keep its image alive.
        self.scan = Scan(tiled, {}, scan.device, scan.dtype, scan.autocast, whole=scan.whole)
        self.recordings: dict[Hashable, Recording] = {}
        self.step = GraphBuffers()
        self.sums: dict[int, Tensor] = {}

    def recording(self, i: int, j: int, key: Hashable, work: Callable[[Recording], None]) -> Recording:
        """The recording of a key, which is made for tile (i, j) if there is none."""
        if key not in self.recordings:
            while len(self.recordings) >= MOST_RECORDINGS:
                del self.recordings[next(iter(self.recordings))]  # the oldest
            self.recordings[key] = Recording(Outline(self.tiled, i, j, self.scan.taken), work, self.arena)
        return self.recordings[key]

    def vectors(self) -> dict[int, Tensor]:
        """The vectors; new tensors in the same memory, so that autograd knows nothing of them from earlier runs."""
        return {v: self.step.inputs["vector", v].detach() for v in self.tiled.stage.vectors}
