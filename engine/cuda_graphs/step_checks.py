"""Decides whether the whole step of a network can be captured as one graph (see `execution/whole_step.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from ..capture.program import draws
from ..lowering.stages import StagedProgram
from ..tiling.stage import TiledStage

MOST_TILES = 4  # tiles of a stage; a tile is about thirty launches, and a network may have a hundred stages
MARGIN = 1.1  # memory of a captured step relative to its parts; 0.98 to 1.10 on an H100 (gpu_h100.json)


def is_one_step(staged: StagedProgram, stages: Sequence[TiledStage]) -> bool:
    """Whether a step is the same device work each time, and all its effects are known.

    The caller checks that the image is not split and that halos are on the device.
    """
    program = staged.program
    written = {before for before, _ in program.updates}  # returned as the written tensors themselves
    graphs = program.grad and any(program.values[after].takes_grad for _, after in program.updates)
    return (
        not (program.inputs or program.vectors or program.assigned)
        and staged.place == "device"
        and all(tiled.tiles <= MOST_TILES and not tiled.random for tiled in stages)
        and not any(op.group is not None or draws(op) or op.name == "tensor_hook" for op in program.ops)
        and not graphs
        and written.isdisjoint((program.image, *program.handed_out()))
    )
