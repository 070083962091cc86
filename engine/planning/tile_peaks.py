"""Memory of the heaviest tile of a stage, and a cache of it for other choices and tile sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..tiling.stage import Schedules


@dataclass(frozen=True)
class TilePeak:
    """Memory of a tile, measured on tensors without values.

    Attributes:
        tile: (height, width) of the tile.
        blocks: bytes of all blocks that the tile computes.
        peak, held: see `tile_peak`.
        fixed: bytes of the peak that do not depend on the tile size: gradients of the vectors.
    """

    tile: tuple[int, int]
    blocks: int
    peak: int
    held: int
    fixed: int

    def scaled(self, tile: tuple[int, int], blocks: int) -> TilePeak:
        """An estimate for a tile of another size: activations are proportional to the bytes of blocks."""
        share = blocks / max(1, self.blocks)
        grown = self.fixed + int(share * max(0, self.peak - self.fixed))
        return TilePeak(tile, blocks, grown, int(share * self.held), self.fixed)


@dataclass(frozen=True)
class Known:
    """A cache for the choices of stored maps of a program, which share most of their stages.

    Attributes:
        peaks: simulated peaks by stage.
        schedules: see `TiledStage`.
    """

    peaks: dict[Any, list[TilePeak]] = field(default_factory=dict)
    schedules: Schedules = field(default_factory=dict)
