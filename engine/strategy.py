"""Which maps are stored whole, and which are computed again: the choices for a network of several sweeps.

Maps that a later sweep reads can be kept until the backward (fastest), or only until the next *cut*: a map through
which everything goes, such as the output of a residual block. The sweeps between two cuts are a *range*: its inside is
let go after the forward and computed again in the backward (Chen et al., 2016). Early maps are the largest, so a
further choice is not to store those at all: each early sweep then starts at the last cut, or at the image.

    keep everything         3 units of arithmetic (a unit is one forward; stock PyTorch takes 3 as well)
    ranges                  4, and the maps of one range besides the cuts
    early maps not stored   more: a range of m reductions is computed about m/2 times in each direction
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from .graph import Graph, Network, crossing, levels, split
from .ops import Local, Maps, Node, Reduction, Small
from .ops.base import arguments
from .trace import Op, refs

# Arithmetic that could be done while a byte is moved; pointwise ops cost what they move.
_FLOPS_PER_BYTE = {"cpu": 10, "cuda": 200}


@dataclass(frozen=True)
class Strategy:
    """One choice.

    Attributes:
        name: for the table of the plan.
        network: the steps.
        cost: of a step, in units of arithmetic of stock PyTorch's forward, moved bytes included.
        stored_bytes: the most bytes of stored maps and their gradients at any time of a step.
    """

    name: str
    network: Network
    cost: float
    stored_bytes: int


def strategies(maps: Maps, nodes: Sequence[Node | Op], training: bool, image_grad: bool) -> Iterator[Strategy]:
    """The choices that are worth it: the first keeps everything, each later one is slower and needs less memory."""
    every = every_strategy(maps, nodes, training, image_grad)
    least = next(every)
    yield least
    if len(least.network.sweeps) > 1:
        for strategy in sorted(every, key=lambda s: (s.cost, s.stored_bytes)):
            if strategy.stored_bytes < least.stored_bytes:
                least = strategy
                yield strategy


def every_strategy(maps: Maps, nodes: Sequence[Node | Op], training: bool, image_grad: bool) -> Iterator[Strategy]:
    """All choices, that of keeping everything first; which there are does not depend on the image's size."""
    unit = max(1, sum(_cost(maps, node) for node in nodes if isinstance(node, Local)))

    def weigh(name: str, network: Network) -> Strategy:
        stored = stored_peak(network, training, network.wanted(image_grad))
        return Strategy(name, network, network_cost(network, training) / unit, stored)

    yield weigh("all that is read again", split(maps, nodes, crossing(maps, nodes)))
    for name, network in _candidates(maps, nodes, training):
        yield weigh(name, network)


def _candidates(maps: Maps, nodes: Sequence[Node | Op], training: bool) -> Iterator[tuple[str, Network]]:
    cuts = cut_maps(maps, nodes)
    fixed = _drawn_by_position(maps, nodes)
    read_later, level = crossing(maps, nodes), levels(maps, nodes)
    stored = [v for v in read_later if level[v] or v in fixed]
    if len(stored) < len(read_later):
        yield "all that is read again, but for the first layers", split(maps, nodes, stored)
    for grouped in (1, 2, 4) if training else (1,):
        chosen = cuts[::-1][::grouped][::-1]
        read_later = crossing(maps, nodes, chosen)
        level = levels(maps, nodes, chosen)
        for number in range(len(chosen) + 1):
            end = level[chosen[number - 1]] if number else -1
            inside = {v for v in read_later if level[v] <= end and v not in fixed}
            for dropped, text in ((inside - set(chosen), "cuts only"), (inside, "nothing")):
                if number and not dropped:
                    continue
                stored = [v for v in read_later if v not in dropped]
                network = split(maps, nodes, stored, [v for v in chosen if v in stored])
                if training:
                    network.ranges = ranges_between(network, [v for v in chosen if v in stored])
                name = f"every {['', '', 'second ', '', 'fourth '][grouped]}cut"
                name += ", and what is between while it is needed" if training else ", and what is read again"
                if number:
                    name += f"; up to cut {number} of {len(chosen)} {text}"
                yield name, network
                if not number:
                    break


def cut_maps(maps: Maps, nodes: Sequence[Node | Op]) -> list[int]:
    """Maps that everything behind them goes through, at most one of each level, in program order.

    A map whose statistics are taken is not one: what normalises it is a better place.
    """
    order = [node for node in nodes if isinstance(node, Local)]
    reduced = {node.value for node in nodes if isinstance(node, Reduction)}
    last: dict[int, int] = {}
    for place, node in enumerate(order):
        last.update(dict.fromkeys(node.reads, place))
    last.update((v, len(order)) for v in refs(maps.program.output))
    level = levels(maps, nodes)
    live: set[int] = {maps.program.image}
    found: dict[int, int] = {}
    for place, node in enumerate(order):
        live |= set(node.op.outputs)
        live = {v for v in live if last.get(v, -1) > place}
        if len(live) == 1 and not live & reduced:
            (value,) = live
            if value in node.op.outputs and level[value] > 0:
                found[level[value]] = value
    return list(found.values())


def _drawn_by_position(maps: Maps, nodes: Sequence[Node | Op]) -> set[int]:
    """Maps that come out of random numbers drawn tile by tile: another sweep would draw others."""
    found: set[int] = set()
    for node in nodes:
        if isinstance(node, Local) and (node.random or not found.isdisjoint(node.reads)):
            found.update(node.op.outputs)
    return found


def ranges_between(network: Network, cuts: Sequence[int]) -> list[range]:
    """The steps between the sweeps that write two cuts; not those behind the last, whose backward comes first."""
    writers = [n for n, step in enumerate(network.steps) if isinstance(step, Graph) and set(step.stored) & set(cuts)]
    first = next(n for n, step in enumerate(network.steps) if isinstance(step, Graph))
    starts = [first, *(n + 1 for n in writers)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]  # noqa: RUF007


def _cost(maps: Maps, node: Local) -> float:
    """Arithmetic and moved bytes of an op, as arithmetic."""
    values = maps.program.values
    outputs = sum(math.prod(values[v].shape) for v in node.op.outputs)
    moved = sum(math.prod(values[v].shape) * values[v].dtype.itemsize for v in (*node.reads, *node.op.outputs))
    flops = 0
    if node.op.name in ("conv2d", "linear"):
        weight = arguments(node.op, "input weight")["weight"].value
        flops = 2 * outputs * math.prod(values[weight].shape[1:])
    kind = values[maps.program.image].device.type
    return flops + _FLOPS_PER_BYTE.get(kind, 50) * moved


def network_cost(network: Network, training: bool) -> float:
    """Arithmetic and moved bytes of a step: sweeps forward, again in the backward, and once more inside ranges."""
    total = 0.0
    inside = {n for part in network.ranges for n in part}
    for number, step in enumerate(network.steps):
        if not isinstance(step, Graph):
            continue
        costs = [_cost(network.maps, local) for local in step.locals]
        total += sum(costs) * (1 if not training else 3 + (number in inside))
        if training:
            read = {v for local in step.locals for v in local.reads}
            again = (
                cost for cost, local in zip(costs, step.locals, strict=True)
                if local.unvalued is None or set(local.op.outputs) & read
            )  # fmt: skip
            total += sum(again)
    return total


def _reads(step: Op | Small | Graph) -> Sequence[int]:
    """The maps that a step takes whole, and the smalls of one that is no sweep."""
    return step.sources if isinstance(step, Graph) else step.inputs


def stored_peak(network: Network, training: bool, wanted: Container[int]) -> int:
    """The most bytes of stored maps, of what ops make of them whole, and of their gradients, at any time of a step.

    A stored map lives from the sweep that writes it to its last reader; where a backward will follow, until the
    backward of the sweep that wrote it, since the sweeps that read it keep it. Its gradient comes into being in the
    backward of its last reader, and goes with the map. Inside a range both hold for the forward, and then for the
    computation in the backward.

    Args:
        wanted: the values that want a gradient.
    """
    steps, values = network.steps, network.program.values
    end = len(steps)
    made: dict[int, int] = {}
    last: dict[int, int] = dict.fromkeys(refs(network.program.output), end)
    for number, step in enumerate(steps):
        outputs = step.stored if isinstance(step, Graph) else step.outputs
        if isinstance(step, Small):
            outputs = [v for v in outputs if v in network.maps]
        made.update((v, number) for v in outputs)
        for v in _reads(step):
            last[v] = max(last.get(v, 0), number)
    if not any(graph.stored for graph in network.sweeps):
        return 0
    size = {v: math.prod(values[v].shape) * values[v].dtype.itemsize for v in made}
    within = {v: part for part in network.ranges for v in made if made[v] in part and last.get(v, end) < part.stop}

    # A band's own rows go when what the sweeps read has been fetched; in the backward their gradient stands there.
    held = {v for step in steps if not isinstance(step, Small) for v in _reads(step)}
    held.update(refs(network.program.output))

    def alive(now: int, backward: bool) -> int:
        total = 0
        for v in made:
            if made[v] > now:
                continue
            if v not in held:
                total += size[v] * (now <= last.get(v, end))
                continue
            part = within.get(v)
            again = part is None or now in part  # within a range: computed again
            there = now <= last.get(v, end) or (training and part is None)
            total += size[v] * (again if backward else there)
            if backward and v in wanted and last.get(v, end) >= now and (part is None or now in part):
                total += size[v]
        return total

    fetched = {number for number in made.values() if isinstance(steps[number], Small)}
    times = [number for number, step in enumerate(steps) if isinstance(step, Graph) or number in fetched] + [end]
    return max(max(alive(now, False), alive(now, True) if training else 0) for now in times)
