"""What the heaviest tile of a stage takes, and what has been found of it for other choices and tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..tiling.stage import Schedules


@dataclass(frozen=True)
class TilePeak:
    """What a run of a tile on tensors without values has counted.

    Attributes:
        tile: its side.
        blocks: bytes of all blocks that it computes.
        peak, held: see `tile_peak`.
        fixed: bytes of the peak that do not depend on the tile: its gradients of the vectors.
    """

    tile: tuple[int, int]
    blocks: int
    peak: int
    held: int
    fixed: int

    def scaled(self, tile: tuple[int, int], blocks: int) -> TilePeak:
        """What a tile of other blocks would take: activations grow as the blocks do."""
        share = blocks / max(1, self.blocks)
        grown = self.fixed + int(share * max(0, self.peak - self.fixed))
        return TilePeak(tile, blocks, grown, int(share * self.held), self.fixed)


@dataclass(frozen=True)
class Known:
    """What was found for other choices of stored maps of a program: they have most of their stages in common.

    Attributes:
        peaks: by stage, the exact ones.
        schedules: see `TiledStage`.
    """

    peaks: dict[Any, list[TilePeak]] = field(default_factory=dict)
    schedules: Schedules = field(default_factory=dict)
