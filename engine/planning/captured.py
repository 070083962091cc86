"""What a whole step takes that is captured as one graph: its parts, graphs of its tiles, and what capturing adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..cuda_graphs.one_step import MARGIN
from ..tiling.stage import TiledStage
from .between import value_bytes
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


def captured(plan: Plan, stages: Sequence[TiledStage], most: float) -> Plan | None:
    """A plan with what capturing takes besides; None if the step would take more than `most` bytes.

    The graphs of all tiles are kept, if they fit too.
    """
    graphs = graph_bytes(stages, plan) if plan.training else 0
    for kept in (graphs, 0):
        needed = int(MARGIN * (plan.parts_bytes + kept))
        if needed <= most:
            return replace(plan, capture_bytes=needed - plan.parts_bytes)
    return None
