"""What a whole step takes that is captured as one graph: its parts, graphs of its tiles, and what capturing adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..cuda_graphs.one_step import MARGIN
from ..tiling.stage import TiledStage
from .interstage import value_bytes
from .plan import Plan


def graph_bytes(stages: Sequence[TiledStage], plan: Plan) -> int:
    """What graphs of tiles that are not planned may hold at most: all that their stages make and do not store."""
    made = (
        value_bytes(tiled.stage.program.values[v])
        for index, tiled in enumerate(stages)
        for local in tiled.stage.locals
        for v in local.op.outputs
        if plan.retained_of(index) < tiled.tiles and v not in tiled.stage.stored
    )
    return sum(made)


def keeps_graphs(plan: Plan, stages: Sequence[TiledStage], most: float) -> bool | None:
    """Whether a captured step keeps the graphs of all tiles within `most` bytes; None if it does not fit without."""
    if plan.training and MARGIN * (plan.parts_bytes + graph_bytes(stages, plan)) <= most:
        return True
    return False if MARGIN * plan.parts_bytes <= most else None


def captured(plan: Plan, stages: Sequence[TiledStage], most: float) -> Plan | None:
    """A plan with what capturing takes besides; None if the step would take more than `most` bytes."""
    keeps = keeps_graphs(plan, stages, most)
    if keeps is None:
        return None
    needed = plan.parts_bytes + (graph_bytes(stages, plan) if keeps else 0)
    return replace(plan, capture_bytes=int(MARGIN * needed) - plan.parts_bytes)
