"""A lower bound of the memory of all plans of a program, to reject budgets that are too small early."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import kernels
from ..capture.program import Op
from ..errors import BudgetError, NoRoomError
from ..lowering.ops import Local, Maps, Node
from ..tiling.memory import format_bytes, format_enough
from . import constants
from .interstage import value_bytes
from .library_overhead import convolutions, least_cpu_libraries
from .request import Request


def refuse_hopeless(maps: Maps, nodes: Sequence[Node | Op], request: Request, shared: bool) -> None:
    """Raise an error if the budget is too small for all choices of stored maps and all tiles.

    Args:
        maps: the maps of the program.
        nodes: its sorted nodes.
        request: the constraints of the step.
        shared: whether the image is split over processes, which then decide together.

    Raises:
        BudgetError: if the budget is too small; the message contains the needed bytes.
    """
    if request.budget is None:
        return
    own = held_bytes(maps, request.training)
    limit = format_bytes(request.budget)
    if request.budget < own:
        what = "parameters and their gradients alone need" if request.training else "the parameters alone need"
        text = f"no tile fits: {what} {format_enough(own)}, the budget is {limit}; give a larger budget"
        raise NoRoomError(text, own)
    least = least_bytes(maps, nodes, request)
    if request.budget < least and not shared:
        height, width = maps.size(maps.program.image)
        raise BudgetError(
            f"no tile fits: an image of {height} x {width} needs at least {format_enough(least)} without any tile "
            f"(parameters, copies of them, compiled kernels, outputs), the budget is {limit}; "
            "give a larger budget",
            least,
        )


def least_bytes(maps: Maps, nodes: Sequence[Node | Op], request: Request) -> int:
    """Bytes that every plan needs for all choices of stored maps and all tile sizes.

    They are the parameters with their gradients and the maps that the network returns. On the CPU they include a copy
    of the largest weight, a compiled kernel per convolution, and the records of the network.
    """
    program = maps.program
    values, total = program.values, held_bytes(maps, request.training)
    results = {v for v in program.results() if v in maps and v != program.image and v not in program.inputs}
    made = {v for node in nodes if isinstance(node, Local) for v in node.op.outputs}
    total += sum(value_bytes(values[v]) for v in results & made)
    device = values[program.image].device
    casts = torch.is_autocast_enabled("cpu") or any(op.autocast is not None for op in program.ops)
    if device.type != "cpu" or casts or kernels.enabled(device):
        return total
    total += len(values) * (constants.VALUE_BYTES + constants.CHOICE_BYTES)
    weights = [values[v] for local in convolutions(nodes) for v in local.op.inputs if v not in maps]
    weights = [value for value in weights if len(value.shape) == 4]
    total += max((value_bytes(value) for value in weights if max(value.shape[2:]) > 1), default=0)
    if request.count_tile or request.tile is None:
        heaviest = max(map(value_bytes, weights), default=0)
        total += least_cpu_libraries(nodes, values, heaviest, request.training)
    return total


def held_bytes(maps: Maps, training: bool) -> int:
    """Bytes of parameters and buffers, and in training of gradients."""
    named = {v.name: v for v in maps.program.values if v.name is not None}
    return sum(value_bytes(value) * (1 + (training and value.trainable)) for value in named.values())
