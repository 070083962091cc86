"""Which maps are stored whole, and which are computed again: the choices for a network of several stages.

Maps that a later stage reads can be kept until the backward (fastest), or only until the next *cut*: a map through
which everything goes, such as the output of a residual block. The stages between two cuts are a *segment*: its inside
is let go after the forward and computed again in the backward (Chen et al., 2016). Early maps are the largest, so a
further choice is not to store those at all: each early stage then starts at the last cut, or at the image.

    keep everything         3 units of arithmetic (a unit is one forward; stock PyTorch takes 3 as well)
    segments                4, and the maps of one segment besides the cuts; less where late maps, small ones, are kept
    early maps not stored   more: a segment of m reductions is computed about m/2 times in each direction

A network of one stage stores nothing. On the CPU it may be cut into parts all the same:
`tile_parts.py`, `packed_parts.py`.

Each of them may keep its maps elsewhere, on a GPU in the host's memory, else in a file; then the way there and back is
what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..capture.program import Op
from ..lowering.ops import Local, Maps, Node, Reduction, VectorOp
from ..lowering.ops.base import arguments
from ..lowering.stages import Stage, StagedProgram, crossing, handed_out, levels, split
from . import constants
from .interstage import brought, value_bytes
from .lifetimes import stored_peaks
from .packed_parts import cuts_by_weights, packed_bytes
from .tile_parts import cuts_by_outputs


@dataclass(frozen=True)
class Strategy:
    """One choice.

    Attributes:
        name: for the table of the plan.
        network: the steps, and where maps are kept.
        cost: of a step, in units of arithmetic of stock PyTorch's forward, moved bytes included.
        stored_bytes: the most bytes of stored maps and their gradients on the device at any time of a step.
        away_bytes: the same where else they are kept.
        packed_bytes: of the weights that a stage packs (`lowering/onednn.py`), where those are most.
    """

    name: str
    staged: StagedProgram
    cost: float
    stored_bytes: int
    away_bytes: int = 0
    packed_bytes: int = 0

    @property
    def bytes(self) -> int:
        """What it takes besides tiles and the network, as far as choices differ in that."""
        return self.stored_bytes + self.packed_bytes


def strategies(maps: Maps, nodes: Sequence[Node | Op], training: bool, image_grad: bool) -> Iterator[Strategy]:
    """The choices that are worth it: the first keeps everything, each later one is slower and needs less memory.

    A network of one stage has others than that on the CPU: in training tiles that go through a part of it at a time,
    which store what it does not but need less; in inference weights that are packed for a part of it at a time.
    """
    every = every_strategy(maps, nodes, training, image_grad)
    least = next(every)
    yield least
    if len(least.staged.stages) > 1 or least.packed_bytes:
        for strategy in sorted(every, key=lambda s: (s.cost, s.bytes)):
            if strategy.bytes < least.bytes:
                least = strategy
                yield strategy
    elif training:
        yield from (strategy for strategy in every if strategy.staged.place == "disk")


def every_strategy(maps: Maps, nodes: Sequence[Node | Op], training: bool, image_grad: bool) -> Iterator[Strategy]:
    """All choices, that of keeping everything first; which there are does not depend on the image's size."""
    known = {id(node): _cost(maps, node) for node in nodes if isinstance(node, Local)}
    unit = max(1, sum(known.values()))

    kind = maps.program.values[maps.program.image].device.type

    def weigh(name: str, staged: StagedProgram, more: float = 0) -> Iterator[Strategy]:
        cost = program_cost(staged, training, known) + more
        stored, here = stored_peaks(staged, training, wanted)
        packed = 0 if training or kind != "cpu" else max(map(packed_bytes, staged.stages), default=0)
        yield Strategy(name, staged, cost / unit, stored, packed_bytes=packed)
        moved = moved_bytes(staged, training)
        for place, flops in constants.ELSEWHERE.get(kind, {}).items() if moved else ():
            away = replace(staged, place=place)
            cost_there = (cost + flops * moved) / unit
            yield Strategy(f"{name}; {PLACES[place]}", away, cost_there, here, stored - here, packed)

    everything = split(maps, nodes, crossing(maps, nodes))
    wanted = everything.wanted(image_grad)  # of all choices: they have the same ops
    yield from weigh("all maps that are read again", everything)
    for name, staged in _candidates(maps, nodes, training):
        yield from weigh(name, staged)
    if kind == "cpu" and len(everything.stages) == 1:
        for cuts in cuts_by_outputs(maps, nodes) if training else cuts_by_weights(maps, nodes, _through(maps, nodes)):
            staged = split(maps, nodes, crossing(maps, nodes, cuts), cuts)
            name = f"{len(staged.stages)} parts, and the maps between them"
            yield from weigh(name, staged, constants.FLOPS_PER_BYTE[kind] * moved_bytes(staged, training))


PLACES = {"device": "on the device", "host": "in host memory", "disk": "on disk"}


def _candidates(maps: Maps, nodes: Sequence[Node | Op], training: bool) -> Iterator[tuple[str, StagedProgram]]:
    cuts = cut_maps(maps, nodes)
    fixed = _drawn_by_position(maps, nodes)
    hooked = any(op.name == "tensor_hook" for op in maps.program.ops)  # of a segment they would see another graph
    read_later, level = crossing(maps, nodes), levels(maps, nodes)
    stored = [v for v in read_later if level[v] or v in fixed]
    if len(stored) < len(read_later):
        yield "all maps that are read again but those of the first layers", split(maps, nodes, stored)
    for grouped in (1, 2, 4) if training else (1,):
        every = cuts[::-1][::grouped][::-1]
        for until in range(1 if training and grouped == 1 else len(every), len(every) + 1):
            chosen = every[:until]
            name = _named_after(until, len(every), grouped, training)
            read_later = crossing(maps, nodes, chosen)
            level = levels(maps, nodes, chosen)
            # The more is not stored, the more costs keeping late maps: those choices are no better than others.
            for number in range((until if until == len(every) else 1) + 1):
                end = level[chosen[number - 1]] if number else -1
                inside = {v for v in read_later if level[v] <= end and v not in fixed}
                for dropped, text in ((inside - set(chosen), "the ends only"), (inside, "nothing")):
                    if number and not dropped:
                        continue
                    stored = [v for v in read_later if v not in dropped]
                    kept = [v for v in chosen if v in stored]
                    staged = split(maps, nodes, stored, kept)
                    if training and kept and not hooked:
                        staged.segments = segments_between(staged, kept)
                    yield name + (f"; of blocks 1 to {number} {text}" if number else ""), staged
                    if not number:
                        break


def _named_after(until: int, count: int, grouped: int, training: bool) -> str:
    """What a choice keeps, in words: a block is what lies between two cuts."""
    block = {1: "block", 2: "second block", 4: "fourth block"}[grouped]
    if not training:
        return f"the end of every {block}, and what is read again"
    if until < count:
        return f"the ends of blocks 1 to {until} of {count}, and all maps of the others"
    return f"the end of every {block}"


def cut_maps(maps: Maps, nodes: Sequence[Node | Op]) -> list[int]:
    """Maps that everything after them goes through, at most one of each level, in program order; none of the first.

    A map whose statistics are taken is not one: what normalises it is a better place.
    """
    level = levels(maps, nodes)
    return list({level[v]: v for v in _through(maps, nodes) if level[v] > 0}.values())


def _through(maps: Maps, nodes: Sequence[Node | Op]) -> list[int]:
    """Maps that everything after them goes through and no statistics are taken of, in program order."""
    order = [node for node in nodes if isinstance(node, Local)]
    reduced = {node.value for node in nodes if isinstance(node, Reduction)}
    last: dict[int, int] = {}
    for place, node in enumerate(order):
        last.update(dict.fromkeys(node.reads, place))
    last.update((v, len(order)) for v in maps.program.results())
    there = handed_out(maps)  # those are stored in any case
    live: set[int] = {maps.program.image}
    found: list[int] = []
    for place, node in enumerate(order):
        live |= set(node.op.outputs)
        live = {v for v in live if last.get(v, -1) > place}
        through = {v for v in live if v not in there or v in node.op.outputs}
        if len(through) == 1 and not through & reduced:
            found += [v for v in through if v in node.op.outputs]
    return found


def _drawn_by_position(maps: Maps, nodes: Sequence[Node | Op]) -> set[int]:
    """Maps that come out of random numbers drawn tile by tile: another stage would draw others."""
    found: set[int] = set()
    for node in nodes:
        if isinstance(node, Local) and (node.random or not found.isdisjoint(node.reads)):
            found.update(node.op.outputs)
    return found


def segments_between(staged: StagedProgram, cuts: Sequence[int]) -> list[range]:
    """The steps between the stages that write two cuts; not those after the last, whose backward comes first.

    None goes on after a step that makes what the network hands out: what reads that has to read the very tensor.
    """
    written = (n for n, step in enumerate(staged.steps) if isinstance(step, Stage) and set(step.stored) & set(cuts))
    end = max(written, default=-1)
    handed_out, values = set(staged.program.handed_out()), staged.program.values
    ends = set(cuts) | {v for v in handed_out if values[v].takes_grad}
    first = next(n for n, step in enumerate(staged.steps) if isinstance(step, Stage))
    writers = [n for n, step in enumerate(staged.steps) if first <= n <= end and not ends.isdisjoint(_makes(step))]
    starts = [first, *(n + 1 for n in writers)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]  # noqa: RUF007


def _cost(maps: Maps, node: Local) -> float:
    """Arithmetic and moved bytes of an op, as arithmetic."""
    values = maps.program.values
    outputs = sum(math.prod(values[v].shape) for v in node.op.outputs)
    moved = sum(value_bytes(values[v]) for v in (*node.reads, *node.op.outputs))
    flops = 0
    if node.op.name in ("conv2d", "linear"):
        weight = arguments(node.op, "input weight")["weight"].value
        flops = 2 * outputs * math.prod(values[weight].shape[1:])
    kind = values[maps.program.image].device.type
    return flops + constants.FLOPS_PER_BYTE.get(kind, 50) * moved


def stage_cost(staged: StagedProgram, stage: Stage) -> float:
    """Arithmetic and moved bytes of one pass of a stage."""
    return sum(_cost(staged.maps, local) for local in stage.locals)


def program_cost(staged: StagedProgram, training: bool, known: Mapping[int, float] | None = None) -> float:
    """Arithmetic and moved bytes of a step: stages forward, again in the backward, and once more inside segments.

    Args:
        known: the costs of the program's ops, by identity, which all choices for it have in common.
    """
    total = 0.0
    known = known or {}
    inside = {n for part in staged.segments for n in part}
    for number, step in enumerate(staged.steps):
        if not isinstance(step, Stage):
            continue
        costs = [known[id(local)] if id(local) in known else _cost(staged.maps, local) for local in step.locals]
        total += sum(costs) * (1 if not training else 3 + (number in inside))
        if training:
            read = {v for local in step.locals for v in local.reads}
            again = (
                cost
                for cost, local in zip(costs, step.locals, strict=True)
                if local.unvalued is None or set(local.op.outputs) & read
            )
            total += sum(again)
    return total


def _makes(step: Op | VectorOp | Stage) -> Sequence[int]:
    return step.results if isinstance(step, Stage) else step.outputs


def moved_bytes(staged: StagedProgram, training: bool) -> int:
    """Bytes of what a step writes and reads elsewhere, if maps that stages alone read are kept there."""
    values, stage_maps = staged.program.values, staged.stage_maps()
    inside = {n for part in staged.segments for n in part}
    total = 0
    for number, stage in enumerate(staged.steps):
        if isinstance(stage, Stage):
            read = sum(value_bytes(values[v]) for v in stage.sources if v in stage_maps)
            written = sum(value_bytes(values[v]) for v in stage.stored if v in stage_maps)
            total += (read + written) * (1 + (training and number in inside))
            if training:  # sources and gradients; a gradient of a source is added to
                total += 3 * read + written
    return total + (2 * sum(value_bytes(values[v]) for v in brought(staged)) if training else 0)
