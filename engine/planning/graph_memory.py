"""Memory of a whole step that is captured as one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..cuda_graphs.step_checks import MARGIN
from ..tiling.stage import TiledStage
from .interstage import value_bytes
from .plan import Plan


def graph_bytes(stages: Sequence[TiledStage], plan: Plan) -> int:
    """Upper bound of the bytes that graphs of all other tiles hold: everything that their stages make but not store."""
    made = (
        value_bytes(tiled.stage.program.values[v])
        for index, tiled in enumerate(stages)
        for local in tiled.stage.locals
        for v in local.op.outputs
        if plan.retained_of(index) < tiled.tiles and v not in tiled.stage.stored
    )
    return sum(made)


def keeps_graphs(plan: Plan, stages: Sequence[TiledStage], most: float) -> bool | None:
    """Whether a captured step fits `most` bytes with the graphs of all tiles; None if it does not fit without."""
    if plan.training and MARGIN * (plan.parts_bytes + graph_bytes(stages, plan)) <= most:
        return True
    return False if MARGIN * plan.parts_bytes <= most else None


def captured(plan: Plan, stages: Sequence[TiledStage], most: float) -> Plan | None:
    """The plan with the additional memory of a capture; None if the step would exceed `most` bytes."""
    keeps = keeps_graphs(plan, stages, most)
    if keeps is None:
        return None
    needed = plan.parts_bytes + (graph_bytes(stages, plan) if keeps else 0)
    return replace(plan, capture_bytes=int(MARGIN * needed) - plan.parts_bytes, keeps_graphs=keeps)
