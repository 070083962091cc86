"""Strategies of a network with several stages: which maps are stored, and which are recomputed.

Maps that a later stage reads can be stored until the backward (fastest), or only until the next *cut*. A cut is a map
on which all later ops depend, such as the output of a residual block. The stages between two cuts are a *segment*. Its
inner maps are freed after the forward and recomputed in the backward (Chen et al., 2016). Early maps are the largest,
so another option is not to store them at all: each early stage then starts at the last cut, or at the image.

    store everything        3 units of arithmetic (a unit is one forward; stock PyTorch also takes 3)
    segments                4, and the maps of one segment in addition to the cuts; less if late, small maps are stored
    early maps not stored   more: a segment of m reductions is computed about m/2 times in each direction

A network of one stage stores nothing. On the CPU it may still be cut into parts: `cuts.py`.

All strategies may offload their maps: on a GPU to host memory, otherwise to a file. The transfers then add to the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, pairwise

from ..capture.program import Op
from ..lowering.ops import Local, Maps, Node, Reduction, VectorOp
from ..lowering.ops.base import arguments
from ..lowering.stages import Divider, ProgramStage, StagedProgram, handed_out
from . import constants
from .cuts import cuts_by_outputs, cuts_by_weights, packed_bytes
from .interstage import brought, value_bytes
from .lifetimes import stored_peaks


@dataclass(frozen=True)
class Strategy:
    """One choice of stored maps.

    Attributes:
        name: description for the printed plan.
        staged: the steps, and the storage of maps.
        cost: cost of a step in forwards of stock PyTorch, including moved bytes.
        stored_bytes: peak of the bytes of stored maps and their gradients on the device.
        away_bytes: peak of the offloaded bytes.
        packed_bytes: bytes of the weights that a stage packs (`lowering/onednn.py`), in the stage with the most.
        before: makes the useful strategies between the one before and this one, by cost.
    """

    name: str
    staged: StagedProgram
    cost: float
    stored_bytes: int
    away_bytes: int = 0
    packed_bytes: int = 0
    before: Callable[[], list[Strategy]] = list

    @property
    def bytes(self) -> int:
        """The part of the memory, without tiles and parameters, in which strategies differ."""
        return self.stored_bytes + self.packed_bytes


_Series = Sequence[Callable[[], list[Strategy]]]
"""Strategies of one kind, made when needed: each stores less than the one before and, as a rule, costs more."""


def _sampled(series: _Series) -> list[int]:
    """A few places from all over a series, with the first and the last."""
    last = len(series) - 1
    return [*range(0, last, -(-last // constants.SAMPLE) or 1), last]


def _sample(every: Iterable[_Series]) -> Iterator[Strategy]:
    return (strategy for series in every for place in _sampled(series) for strategy in series[place]())


def strategies(maps: Maps, nodes: Sequence[Node | Op], training: bool, image_grad: bool) -> Iterator[Strategy]:
    """The useful strategies: the first stores everything, each later one is slower and needs less memory.

    Long series of similar strategies are sampled; `Strategy.before` makes those between two of the sample.

    On the CPU a network of one stage has other strategies. In training, tiles run through one part of the network at a
    time, which stores maps between parts but needs smaller tiles. In inference, weights are packed for one part at a
    time.
    """
    every = _every_series(maps, nodes, training, image_grad)
    first = next(every)
    least, *others = _sample([first])
    yield least  # the rest is only made if this one does not fit
    later = list(every)
    sample = chain(others, _sample(later))
    if len(least.staged.stages) > 1 or least.packed_bytes:
        for strategy in _falling(sample, least.bytes):
            yield replace(strategy, before=partial(_between, later, least, strategy))
            least = strategy
    elif training:
        yield from (strategy for strategy in sample if strategy.staged.place == "disk")


def _falling(every: Iterable[Strategy], most: int) -> Iterator[Strategy]:
    """By cost, the strategies that need fewer bytes than `most` and than all cheaper ones."""
    for strategy in sorted(every, key=lambda s: (s.cost, s.bytes)):
        if strategy.bytes < most:
            most = strategy.bytes
            yield strategy


def _between(every: Iterable[_Series], low: Strategy, high: Strategy) -> list[Strategy]:
    """The useful strategies that cost less than `high` and need less memory than `low`."""
    made: list[Strategy] = []
    for series in every:
        for place, later in pairwise(_sampled(series)):
            pairs = zip(series[place](), series[later](), strict=False)
            if any(one.cost < high.cost and other.cost > low.cost for one, other in pairs):
                made += (strategy for make in series[place + 1 : later] for strategy in make())
    return list(_falling((strategy for strategy in made if strategy.cost < high.cost), low.bytes))


def every_strategy(maps: Maps, nodes: Sequence[Node | Op], training: bool, image_grad: bool) -> Iterator[Strategy]:
    """A sample of all strategies, first the one that stores everything; it does not depend on the image's size."""
    return _sample(_every_series(maps, nodes, training, image_grad))


def _every_series(maps: Maps, nodes: Sequence[Node | Op], training: bool, image_grad: bool) -> Iterator[_Series]:
    """All strategies; the first series has those that store everything."""
    known = {id(node): _cost(maps, node) for node in nodes if isinstance(node, Local)}
    unit = max(1, sum(known.values()))

    kind = maps.program.values[maps.program.image].device.type

    def weigh(name: str, staged: StagedProgram, more: float = 0) -> list[Strategy]:
        cost = program_cost(staged, training, known) + more
        stored, here = stored_peaks(staged, training, wanted)
        packed = 0 if training or kind != "cpu" else max(map(packed_bytes, staged.stages), default=0)
        moved = moved_bytes(staged, training)
        elsewhere = constants.ELSEWHERE.get(kind, {}).items() if moved else ()
        there = [(f"{name}; {PLACES[p]}", replace(staged, place=p), (cost + f * moved) / unit) for p, f in elsewhere]
        found = Strategy(name, staged, cost / unit, stored, packed_bytes=packed)
        return [found, *(Strategy(*each, here, stored - here, packed) for each in there)]

    divider = Divider(maps, nodes)
    everything = divider.split(divider.crossing())
    wanted = everything.wanted(image_grad)  # equal for all strategies, which have the same ops
    yield [lambda: weigh("all maps that later stages read", everything)]
    for makes in _candidates(divider, training):
        yield [cache(lambda make=make: [] if (made := make()) is None else weigh(*made)) for make in makes]
    if kind == "cpu" and len(everything.stages) == 1:
        for cuts in cuts_by_outputs(maps, nodes) if training else cuts_by_weights(maps, nodes, _cuttable(maps, nodes)):
            staged = divider.split(divider.crossing(cuts), cuts)
            name = f"the maps between {len(staged.stages)} parts"
            more = constants.FLOPS_PER_BYTE[kind] * moved_bytes(staged, training)
            yield [partial(weigh, name, staged, more)]


PLACES = {"device": "on the device", "host": "in host memory", "disk": "on disk"}


_Make = Callable[[], tuple[str, StagedProgram] | None]


def _candidates(divider: Divider, training: bool) -> Iterator[list[_Make]]:
    """Series of choices, each with its name; None if a choice equals another."""
    maps, nodes, cuts = divider.maps, divider.nodes, cut_maps(divider)
    fixed = _drawn_by_position(maps, nodes)
    hooked = any(op.name == "tensor_hook" for op in maps.program.ops)  # hooks would see another graph in a segment
    read_later, level = divider.crossing(), divider.levels()
    stored = [v for v in read_later if level[v] or v in fixed]
    if len(stored) < len(read_later):
        name = "all maps that later stages read, except those of the first layers"
        yield [lambda: (name, divider.split(stored))]

    @cache
    def cut_at(grouped: int, until: int) -> tuple[list[int], list[int], dict[int, int]]:
        chosen = cuts[::-1][::grouped][::-1][:until]
        return chosen, divider.crossing(chosen), divider.levels(chosen)

    def make(grouped: int, until: int, number: int, ends: bool) -> tuple[str, StagedProgram] | None:
        """The choice that cuts at the first `until` maps and stores none before the end of block `number`.

        With `ends`, the ends of these blocks are stored as well.
        """
        chosen, read_later, level = cut_at(grouped, until)
        end = level[chosen[number - 1]] if number else -1
        dropped = {v for v in read_later if level[v] <= end and v not in fixed} - set(chosen if ends else ())
        if number and not dropped:
            return None
        stored = [v for v in read_later if v not in dropped]
        kept = [v for v in chosen if v in stored]
        staged = divider.split(stored, kept)
        if training and kept and not hooked:
            staged.segments = segments_between(staged, kept)
        text = f"; blocks 1 to {number}: {'ends only' if ends else 'none'}" if number else ""
        return _named_after(until, -(-len(cuts) // grouped), grouped, training) + text, staged

    # The fewer maps are stored, the more storing late maps costs: these choices are not better than others.
    if training and len(cuts) > 1:
        for number, ends in ((0, True), (1, True), (1, False)):
            yield [partial(make, 1, until, number, ends) for until in range(1, len(cuts))]
    for grouped in (1, 2, 4) if training else (1,):
        count = -(-len(cuts) // grouped)
        if count:
            yield [partial(make, grouped, count, number, True) for number in range(count + 1)]
            yield [partial(make, grouped, count, number, False) for number in range(1, count + 1)]


def _named_after(until: int, count: int, grouped: int, training: bool) -> str:
    """The name of a choice; a block is the part of the network between two cuts."""
    block = {1: "block", 2: "second block", 4: "fourth block"}[grouped]
    if not training:
        return f"the end of every {block}, and all maps that later stages read"
    if until < count:
        return f"the ends of blocks 1 to {until} of {count}, and all maps of the others"
    return f"the end of every {block}"


def cut_maps(divider: Divider) -> list[int]:
    """Maps on which all later ops depend, at most one per level, without the first level, in program order.

    Maps whose statistics are computed are excluded; the output of their norm is a better cut.
    """
    level = divider.levels()
    return list({level[v]: v for v in _cuttable(divider.maps, divider.nodes) if level[v] > 0}.values())


def _cuttable(maps: Maps, nodes: Sequence[Node | Op]) -> list[int]:
    """Maps on which all later ops depend and whose statistics are not computed, in program order."""
    order = [node for node in nodes if isinstance(node, Local)]
    reduced = {node.value for node in nodes if isinstance(node, Reduction)}
    last: dict[int, int] = {}
    for place, node in enumerate(order):
        last.update(dict.fromkeys(node.reads, place))
    last.update((v, len(order)) for v in maps.program.results())
    there = handed_out(maps)  # returned maps are always stored
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
    """Maps that depend on random numbers drawn per tile: another stage would draw other numbers."""
    found: set[int] = set()
    for node in nodes:
        if isinstance(node, Local) and (node.random or not found.isdisjoint(node.reads)):
            found.update(node.op.outputs)
    return found


def segments_between(staged: StagedProgram, cuts: Sequence[int]) -> list[range]:
    """The steps between the stages that write two cuts, without those after the last cut, whose backward comes first.

    A segment ends at a step that makes an output of the network, because later steps must read that very tensor.
    """
    written = (
        n for n, step in enumerate(staged.steps) if isinstance(step, ProgramStage) and set(step.stored) & set(cuts)
    )
    end = max(written, default=-1)
    handed_out, values = set(staged.program.handed_out()), staged.program.values
    ends = set(cuts) | {v for v in handed_out if values[v].takes_grad}
    first = next(n for n, step in enumerate(staged.steps) if isinstance(step, ProgramStage))
    writers = [n for n, step in enumerate(staged.steps) if first <= n <= end and not ends.isdisjoint(_makes(step))]
    starts = [first, *(n + 1 for n in writers)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]  # noqa: RUF007


def _cost(maps: Maps, node: Local) -> float:
    """Cost of an op in floating-point operations, including moved bytes."""
    values = maps.program.values
    outputs = sum(math.prod(values[v].shape) for v in node.op.outputs)
    moved = sum(value_bytes(values[v]) for v in (*node.reads, *node.op.outputs))
    flops = 0
    if node.op.name in ("conv2d", "linear"):
        weight = arguments(node.op, "input weight")["weight"].value
        flops = 2 * outputs * math.prod(values[weight].shape[1:])
    kind = values[maps.program.image].device.type
    return flops + constants.FLOPS_PER_BYTE.get(kind, 50) * moved


def stage_cost(staged: StagedProgram, stage: ProgramStage) -> float:
    """Cost of one pass of a stage."""
    return sum(_cost(staged.maps, local) for local in stage.locals)


def program_cost(staged: StagedProgram, training: bool, known: Mapping[int, float] | None = None) -> float:
    """Cost of a step: stages run forward, are recomputed in the backward, and once more inside segments.

    Args:
        staged: the network, divided into stages.
        training: whether there is a backward.
        known: costs of the program's ops by their id, which are equal for all choices.
    """
    total = 0.0
    known = known or {}
    inside = {n for part in staged.segments for n in part}
    for number, step in enumerate(staged.steps):
        if not isinstance(step, ProgramStage):
            continue
        costs = [known[id(local)] if id(local) in known else _cost(staged.maps, local) for local in step.locals]
        total += sum(costs) * (1 if not training else 3 + (number in inside))
        if training:
            read = {v for local in step.locals for v in local.reads}
            again = (
                cost
                for cost, local in zip(costs, step.locals, strict=True)
                if local.memory.unvalued is None or set(local.op.outputs) & read
            )
            total += sum(again)
    return total


def _makes(step: Op | VectorOp | ProgramStage) -> Sequence[int]:
    return step.results if isinstance(step, ProgramStage) else step.outputs


def moved_bytes(staged: StagedProgram, training: bool) -> int:
    """Bytes that a step transfers if maps that only stages read are offloaded."""
    values, stage_maps = staged.program.values, staged.stage_maps()
    inside = {n for part in staged.segments for n in part}
    total = 0
    for number, stage in enumerate(staged.steps):
        if isinstance(stage, ProgramStage):
            read = sum(value_bytes(values[v]) for v in stage.sources if v in stage_maps)
            written = sum(value_bytes(values[v]) for v in stage.stored if v in stage_maps)
            total += (read + written) * (1 + (training and number in inside))
            if training:  # sources and gradients; gradients of sources are read and written
                total += 3 * read + written
    return total + (2 * sum(value_bytes(values[v]) for v in brought(staged)) if training else 0)
