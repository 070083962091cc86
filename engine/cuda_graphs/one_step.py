"""Which networks' whole steps can be captured as one graph (execution/whole_step.py does it)."""

from __future__ import annotations

from collections.abc import Sequence

from ..capture.program import draws
from ..lowering.stages import StagedProgram
from ..tiling.stage import TiledStage

MOST_TILES = 4  # of a stage: each is some thirty launches, of which there are a hundred stages
MARGIN = 1.1  # a captured step takes so much of what its parts do; 0.98 to 1.10 on an H100 (gpu_h100.json)


def is_one_step(staged: StagedProgram, stages: Sequence[TiledStage]) -> bool:
    """Whether a step is the same work on the device each time, and all that it leaves behind is known.

    Of an image that is not split; with halos on the device.
    """
    program = staged.program
    written = {before for before, _ in program.updates}  # what is there afterwards is handed out as the tensor itself
    graphs = program.grad and any(program.values[after].takes_grad for _, after in program.updates)
    return (
        not (program.inputs or program.vectors or program.assigned)
        and staged.place == "device"
        and all(tiled.tiles <= MOST_TILES and not tiled.random for tiled in stages)
        and not any(op.group is not None or draws(op) or op.name == "tensor_hook" for op in program.ops)
        and not graphs
        and written.isdisjoint((program.image, *program.handed_out()))
    )
