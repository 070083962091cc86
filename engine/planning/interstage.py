"""What lies between the steps of a program: how large it is, what a step takes of it, and what may lie elsewhere.

What calls make whole of maps between two stages, as keys and values, the backward alone needs again once the stage that
it was made for is through. Where stored maps are kept elsewhere, so is what autograd saves of this
(`execution/offloaded.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..capture.program import Op, Value
from ..lowering.ops import VectorOp
from ..lowering.stages import Stage, StagedProgram
from ..tiling import stored_maps

# What looks at a tensor's memory in another way; and what does so or copies all of it: autograd keeps nothing of what
# these take but the places that they are told (of `gather` all, whose gradient asks it for its size).
LOOKS = frozenset("view unflatten permute transpose unsqueeze squeeze expand".split())
COPIES = LOOKS - {"expand"} | {"__getitem__", "index_select", "gather", "reshape", "flatten", "contiguous", "cat"}


def value_bytes(value: Value) -> int:
    """Bytes of a tensor of this shape and dtype."""
    return math.prod(value.shape) * value.dtype.itemsize


def takes(step: Op | VectorOp | Stage) -> Sequence[int]:
    """What a step takes whole: maps and vectors."""
    if isinstance(step, Stage):
        return [*step.sources, *step.vectors, *(v for op in step.prelude for v in op.inputs)]
    return step.inputs


def brought(staged: StagedProgram) -> frozenset[int]:
    """The values that may lie elsewhere until a backward brings them here; none of an image that is split.

    Nobody outside gets hold of them; and what reads them takes no parameter, whose changes in place autograd does not
    notice where it does not save tensors itself.
    """
    program = staged.program
    if any(stage.offsets for stage in staged.stages):
        return frozenset()
    segment = {number: part.start for part in staged.segments for number in part}
    state, others, made = set(program.state()), set(program.results()), dict[int, int]()
    of_maps = {v for stage in staged.stages for v in stage.results}
    for number, step in enumerate(staged.steps):
        read = set(takes(step))
        plain = isinstance(step, Stage) or (isinstance(step, Op) and not step.mutated and state.isdisjoint(read))
        others.update(v for v in read & made.keys() if not plain or segment.get(made[v]) != segment.get(number))
        if isinstance(step, Stage) or of_maps.isdisjoint(read):
            continue
        of_maps.update(step.outputs)
        if isinstance(step, Op) and step.name in COPIES and not step.mutated:
            made.update(dict.fromkeys(step.outputs, number))
    values = program.values
    return frozenset(v for v in made if v not in others and value_bytes(values[v]) >= stored_maps.LEAST_BYTES)
