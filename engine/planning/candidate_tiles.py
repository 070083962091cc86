"""Candidate tile sizes for an image, and the tile sizes of deeper stages."""

from __future__ import annotations

import math

from ... import kernels
from ..lowering.stages import ProgramStage, StagedProgram
from . import constants


def sides_worth_trying(staged: StagedProgram, tile: tuple[int, int] | None, training: bool) -> list[tuple[int, int]]:
    """Candidate (height, width) of tiles, largest first.

    Stages of a few layers gain less from large tiles than one stage of all layers. On the CPU they get strips of whole
    rows, unless these are too low, because a strip is contiguous in a stored map. A single stage of narrow maps gets
    strips, too: setting up and cutting its tiles takes as long as computing them, and a strip has only two neighbours.
    Larger tiles also speed it up.
    """
    if tile is not None:
        return [tile]
    height, width = staged.maps.size(staged.program.image)
    kind = staged.program.values[staged.program.image].device.type
    preferred = constants.PREFERRED.get(kind, 1024)
    several = len(staged.stages) > 1
    narrower = 0.0 if kind != "cpu" or several else constants.WIDE_VALUES / _density(staged.stages[0])
    stripes = kind == "cpu" and (several or narrower > 1)
    if stripes and several:
        preferred = constants.PREFERRED_STRIP
    elif kind == "cpu" and not stripes and not training:
        preferred = constants.PREFERRED_IN_INFERENCE
    longest = max(height, width)
    sides = [side for side in constants.SIDES if side <= preferred and side < longest]
    if longest <= preferred:
        sides.insert(0, longest)
    tiles = [(min(side, height), min(side, width)) for side in sides]
    if stripes:
        tiles = [_strip(h * w, height, width) or (h, w) for h, w in tiles]
    for times in sorted(times for times in constants.LARGER_TILES if times <= narrower):
        side = rounded(preferred * math.sqrt(times))
        square = (min(side, height), min(side, width))  # has smaller halos than a low strip
        tiles[:0] = [_strip(side * side, height, width) or square, square]
    return list(dict.fromkeys(tiles)) or [(height, width)]


def _strip(pixels: int, height: int, width: int) -> tuple[int, int] | None:
    """A strip of whole rows with about this many pixels; None if it is too low."""
    rows = pixels // width
    return (min(rounded(rows), height), width) if rows >= constants.LEAST_ROWS else None


def stage_sides(staged: StagedProgram, tile: tuple[int, int]) -> list[tuple[int, int]]:
    """The (height, width) of each stage's tiles, in pixels of its largest source, for a tile of the image.

    The widest block of a deeper stage holds about as many values as that of the first stage. Strips of whole rows
    remain strips. On a GPU an untiled image remains untiled in all stages: a map in one tile is never copied, and the
    gradient of its norm takes fewer passes.
    """
    image = staged.program.values[staged.program.image]
    height, width = staged.maps.size(staged.program.image)
    strips = tile[1] == width
    if tile[0] >= height and tile[1] >= width and (image.device.type != "cpu" or kernels.enabled(image.device)):
        return [tile, *(stage.extent for stage in staged.stages[1:])]
    first, *others = staged.stages
    sides = [tile]
    for stage in others:
        if stage.image in stage.sources:
            sides.append(tile)
            continue
        height, width = stage.extent
        factor = math.sqrt(_density(first) / _density(stage))
        across = width if strips else max(1, min(width, rounded(tile[1] * factor)))
        down = tile[0] * tile[1] * factor**2 / across if strips else tile[0] * factor
        sides.append((max(1, min(height, rounded(down))), across))
    return sides


def _density(stage: ProgramStage) -> float:
    """Values of a stage's widest map per pixel of its largest source."""
    height, width = stage.extent
    values = [*stage.sources, *(v for local in stage.locals for v in local.op.outputs)]
    return max(1, *(math.prod(stage.maps.shape(v)) for v in values)) / (height * width)  # 1 for a batch of size 0


def rounded(side: float) -> int:
    """A side rounded down to a multiple of 32, or of 8 if it is below 32, so that strides divide it."""
    return int(side) // 32 * 32 or int(side) // 8 * 8 or int(side)
