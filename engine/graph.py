"""The recorded program sorted into what runs once before the sweep, in the sweep over tiles, and once after it.

    prelude:  small ops on parameters and constants (weight standardisation, layer scales, stochastic depth's bits)
    sweep:    local ops on maps, block by block; reductions over the image; maps that must exist whole ("stored")
    tail:     everything behind the reductions and stored maps: ordinary PyTorch

Prelude and tail are ordinary autograd. A local op that needs a small from behind a reduction would start a second
sweep; that is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .errors import UnsupportedError
from .ops import Env, Local, Maps, Reduction, Refusal, Whole, find_rule
from .trace import Op, Program, refs

# Calls that read a map only for its dtype and device.
_LIKE_MAP = frozenset({"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"})


@dataclass(slots=True)
class Small:
    """A computation on smalls that is not a recorded call; it runs once per step, before the sweep.

    `run` gets the tensors of `inputs` by value number and returns those of `outputs`.
    """

    run: Callable[[Env], tuple[Tensor, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Graph:
    """A program sorted into prelude, one sweep, and tail. All lists are in program order."""

    program: Program
    maps: Maps
    prelude: list[Op | Small] = field(default_factory=list)
    locals: list[Local] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    tail: list[Op] = field(default_factory=list)
    smalls: list[int] = field(default_factory=list)  # what the sweep takes besides the image

    @property
    def image(self) -> int:
        """The value number of the image."""
        return self.program.image

    def trainable(self) -> set[int]:
        """The smalls that a gradient is wanted for: parameters, and what the prelude makes of them."""
        values = self.program.values
        found = {number for number, value in enumerate(values) if value.trainable}
        for op in self.prelude:
            if found & set(op.inputs):
                found.update(v for v in op.outputs if values[v].dtype.is_floating_point)
        return found

    def apply_rule(self, op: Op) -> Local | Reduction | Whole:
        """What the rule of an op says; its refusal becomes an error that names the module."""
        rule = find_rule(op.name)
        if rule is None:
            raise _refuse(op, f"no exact tile-by-tile rule for '{op.name}' on the image; replace it or report it")
        try:
            return rule(op, self.maps)
        except Refusal as reason:
            raise _refuse(op, str(reason)) from None


def readers_of(graph: Graph) -> dict[int, list[Local]]:
    """The local ops that read each map."""
    readers: dict[int, list[Local]] = {}
    for local in graph.locals:
        for value in local.reads:
            readers.setdefault(value, []).append(local)
    return readers


def private_maps(graph: Graph) -> set[int]:
    """Maps that local ops alone look at."""
    public = {r.value for r in graph.reductions} | set(graph.stored)
    return {v for local in graph.locals for v in local.op.outputs} - public


def small_inputs(graph: Graph) -> list[int]:
    """The smalls that local ops take."""
    found: dict[int, None] = {}
    for local in graph.locals:
        found.update(dict.fromkeys(v for v in local.op.inputs if v not in graph.maps))
        if local.drawn is not None:
            found[local.drawn] = None
    return list(found)


def _live_ops(program: Program) -> list[Op]:
    """Ops that the output or a buffer depends on; unused branches (auxiliary heads) are dropped."""
    wanted = set(refs(program.output))
    live: list[Op] = []
    for op in reversed(program.ops):
        writes_state = any(program.values[v].name or program.values[v].constant is not None for v in op.mutated)
        if writes_state or wanted & set(op.outputs):
            wanted.update(op.inputs)
            live.append(op)
    return live[::-1]


def _draw(program: Program, make: Callable[..., Tensor], like: int, output: int) -> Small:
    """A small that is drawn once per step, with the dtype and device of another value."""
    value = program.values[like]
    return Small(lambda _env: (make(value.dtype, value.device),), (), (output,))


def _refuse(op: Op, reason: str) -> UnsupportedError:
    where = f"module '{op.module}'" if op.module else "the model"
    return UnsupportedError(f"{where}: {reason}")


def _refuse_feedback(op: Op) -> UnsupportedError:
    return _refuse(
        op,
        f"'{op.name}' needs a result over the whole image in the middle of the network (squeeze-and-excite or the "
        "like), which is not possible yet; use a network whose only such step is the last pooling",
    )


def build_graph(program: Program) -> Graph:
    """Sort a recorded program.

    Raises:
        UnsupportedError: naming the module and the remedy, for every op that cannot be computed exactly in one sweep.
    """
    maps = Maps(program, {program.image: (2, 3)})
    graph = Graph(program, maps)
    late: set[int] = set()  # smalls from behind the sweep
    used: dict[int, None] = {}
    stored: dict[int, None] = {}
    for op in _live_ops(program):
        map_inputs = [] if op.name in _LIKE_MAP else maps.inputs(op)
        if not map_inputs:
            if late & set(op.inputs):
                late.update(op.outputs)
                graph.tail.append(op)
            else:
                graph.prelude.append(op)
            continue
        if op.autocast is not None:
            raise _refuse(op, f"'{op.name}' runs in an autocast region of its own; put autocast around the whole model")
        if any(program.values[v].name for v in op.mutated):
            raise _refuse(op, f"'{op.name}' writes the image's values into a parameter or buffer")
        try:
            kind = graph.apply_rule(op)
        except UnsupportedError:
            if late & set(op.inputs):
                raise _refuse_feedback(op) from None
            raise
        if isinstance(kind, Local):
            if late & set(op.inputs):
                raise _refuse_feedback(op)
            if kind.once is not None:
                kind.drawn = len(program.values)
                program.values.append(program.values[op.inputs[0]])
                graph.prelude.append(_draw(program, kind.once, op.inputs[0], kind.drawn))
                used[kind.drawn] = None
            used.update(dict.fromkeys(v for v in op.inputs if v not in maps))
            for output, axes in zip(op.outputs, kind.axes, strict=True):
                maps.axes[output] = axes
            graph.locals.append(kind)
        elif isinstance(kind, Reduction):
            graph.reductions.append(kind)
            late.update(op.outputs)
        else:
            assert isinstance(kind, Whole)
            stored.update(dict.fromkeys(map_inputs))
            late.update(op.outputs)
            graph.tail.append(op)
    stored.update(dict.fromkeys(v for v in refs(program.output) if v in maps))
    graph.stored = list(stored)
    graph.smalls = list(used)
    if not graph.reductions and not graph.stored:
        raise UnsupportedError("the model's output does not depend on the image")
    _check_written(graph)
    return graph


def _check_written(graph: Graph) -> None:
    """A tail or prelude op that writes in place into a value the sweep reads would change it under our hands."""
    swept = set(graph.smalls)
    for op in graph.tail:
        if swept & set(op.mutated):
            raise _refuse(op, f"'{op.name}' writes in place into a tensor that earlier layers read")
