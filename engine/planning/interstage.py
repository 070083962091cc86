"""Values between the steps of a program: their size, their readers, and which of them may be offloaded.

After a stage, the whole tensors that calls made for it from maps, such as keys and values, are needed only in the
backward. If stored maps are offloaded, the tensors that autograd saves of them are offloaded, too
(`execution/offloaded.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from ..capture.program import Op, Value
from ..lowering.ops import VectorOp
from ..lowering.stages import ProgramStage, StagedProgram
from ..tiling import stored_maps

# Ops that return views of their input, and ops that return views or copies. Autograd saves no input of these but their
# indices (for `gather` also the input, because its gradient reads its size).
LOOKS = frozenset("view unflatten permute transpose unsqueeze squeeze expand".split())
COPIES = LOOKS - {"expand"} | {"__getitem__", "index_select", "gather", "reshape", "flatten", "contiguous", "cat"}


def value_bytes(value: Value) -> int:
    """Bytes of a tensor of this shape and dtype."""
    return math.prod(value.shape) * value.dtype.itemsize


def takes(step: Op | VectorOp | ProgramStage) -> Sequence[int]:
    """The whole values that a step reads: maps and vectors."""
    if isinstance(step, ProgramStage):
        return [*step.sources, *step.vectors, *(v for op in step.prelude for v in op.inputs)]
    return step.inputs


def brought(staged: StagedProgram) -> frozenset[int]:
    """The values that may be offloaded until the backward loads them; none if the image is split over processes.

    They are not visible outside the network. Ops that read them read no parameters: for offloaded tensors, autograd
    could not detect in-place changes of parameters.
    """
    program, values = staged.program, staged.program.values
    copied = (v for step in staged.steps if _copies(step) for v in step.outputs)
    large = {v for v in copied if value_bytes(values[v]) >= stored_maps.LEAST_BYTES}
    if not large or any(stage.offsets for stage in staged.stages):
        return frozenset()
    segment = {number: part.start for part in staged.segments for number in part}
    state, others, made = set(program.state()), set(program.results()), dict[int, int]()
    of_maps = {v for stage in staged.stages for v in stage.results}
    for number, step in enumerate(staged.steps):
        read = set(takes(step))
        plain = isinstance(step, ProgramStage) or (isinstance(step, Op) and not step.mutated and state.isdisjoint(read))
        others.update(v for v in read & made.keys() if not plain or segment.get(made[v]) != segment.get(number))
        if isinstance(step, ProgramStage) or of_maps.isdisjoint(read):
            continue
        of_maps.update(step.outputs)
        if _copies(step):
            made.update(dict.fromkeys(step.outputs, number))
    return frozenset(large & made.keys() - others)


def _copies(step: Op | VectorOp | ProgramStage) -> TypeGuard[Op]:
    return isinstance(step, Op) and step.name in COPIES and not step.mutated
