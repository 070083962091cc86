"""Sorts a recorded program into steps: computations on vectors, and stages over the image.

A value is a *map* (it has the image axes) or a *vector*. Its *level* is the number of successive reductions over the
image that it waits for: the image and the parameters have level 0, a result reduced from a map of level n has n + 1.

    level 0      level 1            level 1            level 2        level 2
    image  ->  stage: conv  ->  statistics of it  ->  stage: norm, ... -> pooled  ->  classifier

One pass over the tiles computes everything of one level (`ProgramStage`). The *sources* of a stage are the image and
maps that an earlier stage has stored. A map that a later stage reads is stored or (see `Divider.split`) computed again
from its sources. Ordinary PyTorch computes the vectors between stages, so autograd joins the stages: each is one
function of its sources and vectors. A network whose only reduction is the last pooling is a single stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..capture.program import Op, Program, Ref
from ..errors import UnsupportedError
from .nodes import apply_rule, makes, reads, sort
from .ops import Local, Maps, Node, Reduction, VectorOp, Whole
from .ops.base import arguments


@dataclass(frozen=True)
class Packing:
    """A weight in the memory order of a library's kernel, packed once per pass.

    Attributes:
        weight: the vector to pack.
        packed: the value number under which ops read the packed weight.
        make: packs the weight, multiplied by the factors if there are any.
        factors: vectors with a factor for each filter.
        reads_weight: whether ops also read the weight itself, whose gradient then has the memory order of maps.
    """

    weight: int
    packed: int
    make: Callable[..., Tensor]
    factors: tuple[int, ...] = ()
    reads_weight: bool = False

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of the packed weight."""
        return self.make(torch.empty(shape, dtype=dtype, device="meta")).nbytes


_CAST_BY_AUTOCAST = frozenset({"conv2d", "fused_conv2d", "fused_stem", "linear"})


@dataclass
class ProgramStage:
    """One stage: local ops from its sources to reductions and stored maps, all in program order.

    Attributes:
        sources: maps that exist before the stage: the image, maps that earlier stages stored, and tensors of a map's
            size that no stage makes (position embeddings).
        prelude: computations on vectors that a rewrite (`rewrites.py`) adds; they run once, right before the stage.
        reductions: the reductions of the stage.
        stored: maps that the stage writes whole.
        vectors: the inputs of the stage that are not sources.
        offsets: for a process's band (`tiling/spatial.py`), by source: the first row of the band in the map, and the
            map's rows.
        packings: weights that ops read in packed form.
    """

    program: Program
    maps: Maps
    sources: list[int]
    prelude: list[VectorOp] = field(default_factory=list)
    locals: list[Local] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    vectors: list[int] = field(default_factory=list)
    offsets: dict[int, tuple[int, int]] | None = None
    packings: list[Packing] = field(default_factory=list)

    @property
    def image(self) -> int:
        """The value number of the image."""
        return self.program.image

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width that are cut into tiles: those of the largest source, or of ops that read residents."""
        resident = self.maps.resident
        spread = [local.op.outputs[0] for local in self.locals if not resident.isdisjoint(local.reads)]
        sizes = [self.maps.size(v) for v in (*(v for v in self.sources if v not in resident), *spread)]
        whole = [height for _, height in (self.offsets or {}).values()]
        return max(*whole, *(h for h, _ in sizes), 0), max(w for _, w in sizes)

    @property
    def results(self) -> list[int]:
        """The outputs of the stage: those of its reductions, then the stored maps."""
        return [v for r in self.reductions for v in r.outputs] + self.stored

    @cached_property
    def cast_by_autocast(self) -> frozenset[int]:
        """The vectors that autocast casts in every op that reads them."""
        stored_maps = {v for local in self.locals if local.op.name not in _CAST_BY_AUTOCAST for v in local.op.inputs}
        return frozenset(self.vectors) - stored_maps

    @cached_property
    def kernels(self) -> frozenset[int]:
        """The vectors that convolutions read; they are passed in the memory order of maps."""
        convs = (local.op for local in self.locals if "conv" in local.op.name or local.op.name == "fused_stem")
        return frozenset(v for op in convs for v in op.inputs if len(self.program.values[v].shape) == 4)

    @cached_property
    def reach(self) -> dict[int, frozenset[int]]:
        """The sources and vectors that the gradient of each result reaches; none if it has no gradient."""
        values = self.program.values
        found = {v: frozenset([v]) for v in (*self.sources, *self.vectors)}
        nothing: frozenset[int] = frozenset()
        for local in self.locals:
            reached = nothing.union(*(found.get(v, nothing) for v in (*local.reads, *local.op.inputs)))
            found.update((v, reached if values[v].takes_grad else nothing) for v in local.op.outputs)
        for reduction in self.reductions:
            reached = found.get(reduction.value, nothing)
            found.update((v, reached if values[v].takes_grad else nothing) for v in reduction.outputs)
        return {v: found.get(v, nothing) for v in self.results}

    def replace(self, members: Sequence[Local], made: Local) -> None:
        """Replace the last of these ops by `made`, and remove the others."""
        *others, last = members
        dropped = {id(other) for other in others}
        self.locals = [made if local is last else local for local in self.locals if id(local) not in dropped]

    def change_arguments(self, conv: Local, **changed: Ref) -> None:
        """Replace the `input`, `weight` or `bias` of a convolution by other values."""
        names = "input weight bias stride padding dilation groups"
        given = {name: value for name, value in arguments(conv.op, names).items() if value is not None} | changed
        inputs = tuple(value.value for value in given.values() if isinstance(value, Ref))
        again = apply_rule(replace(conv.op, args=(), kwargs=given, inputs=inputs), self.maps)
        assert isinstance(again, Local)
        for name in ("op", "run", "axes", "reads", "memory"):
            setattr(conv, name, getattr(again, name))


@dataclass
class StagedProgram:
    """A program as a list of steps; each step is complete before the next begins.

    Attributes:
        segments: steps whose maps are freed after the forward and computed again in the backward.
        place: where stored maps that only stages read are stored: "device", "host" or "disk".
    """

    program: Program
    maps: Maps
    steps: list[Op | VectorOp | ProgramStage]
    segments: list[range] = field(default_factory=list)
    place: str = "device"

    @property
    def stages(self) -> list[ProgramStage]:
        return [step for step in self.steps if isinstance(step, ProgramStage)]

    def stage_maps(self) -> dict[int, int]:
        """The stored maps that only stages read, and the number of these stages."""
        readers = dict.fromkeys((v for stage in self.stages for v in stage.stored), 0)
        for step in self.steps:
            for v in step.sources if isinstance(step, ProgramStage) else ():
                if v in readers:
                    readers[v] += 1
        others = [v for step in self.steps if not isinstance(step, ProgramStage) for v in step.inputs]
        for v in (*others, *self.program.results()):
            readers.pop(v, None)
        return readers

    def trainable(self) -> set[int]:
        """The values that a gradient flows through: parameters and values that depend on them, not the image."""
        values = self.program.values
        found = {number for number, value in enumerate(values) if value.trainable}

        def follow(inputs: Iterable[int], outputs: Iterable[int]) -> None:
            if not found.isdisjoint(inputs):
                found.update(v for v in outputs if values[v].takes_grad)

        for step in self.steps:
            if not isinstance(step, ProgramStage):
                follow(step.inputs, step.outputs)
                continue
            for part in (*step.prelude, *(local.op for local in step.locals)):
                follow(part.inputs, part.outputs)
            for reduction in step.reductions:
                follow([reduction.value], reduction.outputs)
        return found

    def wanted(self, image_grad: bool) -> set[int]:
        """`trainable`, and the image if its gradient is wanted."""
        return self.trainable() | ({self.program.image} if image_grad else set())


def readers_of(stage: ProgramStage) -> dict[int, list[Local]]:
    """The local ops that read each map."""
    readers: dict[int, list[Local]] = {}
    for local in stage.locals:
        for value in local.reads:
            readers.setdefault(value, []).append(local)
    return readers


def private_maps(stage: ProgramStage) -> set[int]:
    """Maps that only local ops read."""
    public = {r.value for r in stage.reductions} | set(stage.stored)
    return {v for local in stage.locals for v in local.op.outputs} - public


def only_readers(stage: ProgramStage) -> dict[int, Local]:
    """The reader of each map that a single local op, and nothing else, reads."""
    private = private_maps(stage)
    return {v: found[0] for v, found in readers_of(stage).items() if len(found) == 1 and v in private}


def vector_inputs(stage: ProgramStage) -> list[int]:
    """The vectors that local ops read."""
    return list(dict.fromkeys(v for local in stage.locals for v in vectors_read(local, stage.maps)))


def vectors_read(local: Local, maps: Maps) -> list[int]:
    return [v for v in local.op.inputs if v not in maps]


def handed_out(maps: Maps) -> frozenset[int]:
    """Maps that the caller receives and may differentiate or hook: a later stage must read that same tensor."""
    program = maps.program
    made = set(program.handed_out()) - {program.image, *program.inputs} if program.grad else set[int]()
    return frozenset(v for v in made if v in maps and program.values[v].takes_grad)


def needed_whole(maps: Maps, nodes: Sequence[Node | Op]) -> set[int]:
    """Maps that must be stored: those that ops read whole, and the program's outputs."""
    found = {v for node in nodes if isinstance(node, Whole) for v in maps.inputs(node.op)}
    return found | {v for v in maps.program.results() if v in maps}


_COPIES = frozenset(
    "expand expand_as broadcast_to permute transpose swapaxes reshape view flatten unflatten unsqueeze squeeze".split()
)
_SUMS = frozenset({"add", "__add__", "add_", "__iadd__"})


def before_spreading(maps: Maps, nodes: Sequence[Node | Op], values: Sequence[int]) -> list[int]:
    """The values in program order; maps of at most half the size replace each value that they make by copies and sums.

        (N, H, W, 1, W) -> expand -> (N, H, W, H, W) + (N, H, W, H, W) -> (N, H, W, H * W)

    A bias for each pair of positions is as large as all attention scores. Its source has a row and a column for each
    position, and broadcasting it again tile by tile is free.
    """
    makers = {v: node for node in nodes if isinstance(node, Local) for v in node.op.outputs}
    replaced = {one for value in values for one in _smallest(maps, makers, value)}
    return [v for v in makers if v in replaced]


def _smallest(maps: Maps, makers: Mapping[int, Local], value: int) -> list[int]:
    """The maps with the fewest elements in total that make a map; itself unless they have at most half as many."""
    best, front = [value], [value]
    while True:
        spread = [v for v in front if v in makers and _is_cheap(maps, makers[v])]
        if not spread:
            return best
        largest = max(spread, key=lambda v: _elements(maps, [v]))
        front = list(dict.fromkeys([*(v for v in front if v != largest), *makers[largest].reads]))
        if 2 * _elements(maps, front) <= _elements(maps, best):
            best = front


def _elements(maps: Maps, values: Sequence[int]) -> int:
    return sum(math.prod(maps.shape(v)) for v in values)


def _is_cheap(maps: Maps, local: Local) -> bool:
    """Whether a local op copies or adds maps, position by position."""
    name = local.op.name.removeprefix("flat_")
    inside = all(both == maps.pointwise(v) for v, both in local.reads.items())
    return inside and (name in _COPIES or (name in _SUMS and set(local.op.inputs) <= set(local.reads)))


class Divider:
    """Divides a sorted program into stages; what all divisions share is computed once.

    Args:
        maps: the program's maps.
        nodes: the program's nodes, see `sort`.
    """

    def __init__(self, maps: Maps, nodes: Sequence[Node | Op]):
        self.maps, self.nodes = maps, nodes
        self._seams, whole = handed_out(maps), needed_whole(maps, nodes)
        self._begin = dict.fromkeys((maps.program.image, *maps.program.inputs), 0)
        self._waits = [(isinstance(node, Local), list(self._waits_for(node)), makes(node)) for node in nodes]
        self._locals = {n: node for n, node in enumerate(nodes) if isinstance(node, Local)}  # by position
        self._makers = {v: n for n, local in self._locals.items() for v in local.op.outputs}
        self._given = [v for v in maps.axes if v not in self._makers]
        self._vectors = {n: vectors_read(local, maps) for n, local in self._locals.items()}
        self._storable = [(v, v in whole) for v in (*self._begin, *self._makers)]
        self._reductions = [node for node in nodes if isinstance(node, Reduction)]
        late = _only_for_state(maps, nodes)
        others = [node for node in nodes if not isinstance(node, (Local, Reduction))]
        self._last = [node for node in others if isinstance(node, (Op, VectorOp)) and id(node) in late]
        self._others = [node for node in others if id(node) not in late]
        self._movable, self._uses = _movable(maps, nodes)

    def _waits_for(self, node: Node | Op) -> Iterator[tuple[int, int]]:
        """The values that a node reads, each with the number of levels between that value and the node."""
        for v in reads(node):
            if isinstance(node, Local):
                yield v, int(v in self._seams)
            elif isinstance(node, (Reduction, Whole)):
                yield v, (v in self.maps) + (v in self._seams and isinstance(node, Reduction))
            elif v not in self.maps:
                yield v, 0

    def levels(self, cuts: Container[int] = ()) -> dict[int, int]:
        """The level of every value; parameters and constants, which may be missing, have level 0.

        Args:
            cuts: maps that local ops must read in a later stage than the one that makes them.
        """
        level = dict(self._begin)
        for local, waits, outputs in self._waits:
            after = [level.get(v, 0) + (more or (local and v in cuts)) for v, more in waits]
            level.update(dict.fromkeys(outputs, max(after, default=0)))
        return level

    def crossing(self, cuts: Container[int] = ()) -> list[int]:
        """Maps that a later level reads, or broadcasts, in program order: they are stored, or computed again there."""
        level = self.levels(cuts)
        read_at: dict[int, int] = {}
        for local in self._locals.values():
            for value in local.reads:
                read_at[value] = max(read_at.get(value, 0), level[local.op.outputs[0]])
        return before_spreading(self.maps, self.nodes, [v for v in self._makers if read_at.get(v, 0) > level[v]])

    def split(self, stored: Container[int], cuts: Container[int] = ()) -> StagedProgram:
        """The steps of the program.

        Args:
            stored: which of the `crossing` maps are stored; each stage that reads another computes it again.
            cuts: see `levels`.
        """
        level = self.levels(cuts)
        steps: dict[int, list[Op | VectorOp | ProgramStage]] = {}  # by level
        deferred = self._deferred_levels(level)
        for node in self._others:
            now = deferred.get(id(node), level.get(next(iter(makes(node)), -1), 0))
            steps.setdefault(now, []).append(node.op if isinstance(node, Whole) else node)  # pyright: ignore
        given, written, reduced = ({} for _ in range(3))
        for v in self._given:
            given.setdefault(level.get(v, 0), []).append(v)
        for v, always in self._storable:
            if always or v in stored:
                written.setdefault(level[v], []).append(v)
        for node in self._reductions:
            reduced.setdefault(level[node.value] + (node.value in self._seams), []).append(node)
        available: set[int] = set()
        for now in range(max(level.values(), default=0) + 1):
            available.update(given.get(now, ()))
            if now in reduced or now in written:
                stage = self._stage(reduced.get(now, []), written.get(now, []), available)
                steps.setdefault(now, []).append(stage)
            available.update(written.get(now, ()))
        ordered = [step for now in sorted(steps) for step in steps[now]]
        staged = StagedProgram(self.maps.program, self.maps, [*ordered, *self._last])
        if not staged.stages:
            raise UnsupportedError(
                "the model's output does not depend on the image; call the model itself, without accelerate"
            )
        return staged

    def _deferred_levels(self, level: Mapping[int, int]) -> dict[int, int]:
        """By node identity, the level of the first reader of values that depend only on parameters.

        If they were made at the beginning, the biases of all blocks would be in memory at once.
        """
        first: dict[int, int] = {}
        found: dict[int, int] = {}
        for node, used in self._uses:
            made = makes(node)
            now = level.get(next(iter(made), -1), 0)
            if id(node) in self._movable:
                now = found[id(node)] = min((first[v] for v in made if v in first), default=now)
            for value in used:
                first[value] = min(first.get(value, now), now)
        return found

    def _stage(self, reductions: list[Reduction], written: list[int], available: set[int]) -> ProgramStage:
        """The stage with the local ops that reductions and stored maps need, back to available maps."""
        wanted = [*(r.value for r in reductions), *written]
        needed: set[int] = set()  # positions in the program
        sources: set[int] = set()
        while wanted:
            value = wanted.pop()
            if value in available:
                sources.add(value)
            elif (place := self._makers[value]) not in needed:
                needed.add(place)
                wanted.extend(self._locals[place].reads)
        order = sorted(needed)
        own = [self._locals[place] for place in order]  # other stages may contain them as well
        stage = ProgramStage(self.maps.program, self.maps, sorted(sources), locals=own)
        stage.reductions, stage.stored = reductions, written
        stage.vectors = list(dict.fromkeys(v for place in order for v in self._vectors[place]))
        return stage


# Ops that rearrange parameters, such as a table of positions into a much larger bias for each pair.
_ARRANGES = frozenset(
    "__getitem__ index_select gather narrow view reshape flatten unflatten permute transpose contiguous expand "
    "unsqueeze squeeze".split()
)


def _movable(maps: Maps, nodes: Sequence[Node | Op]) -> tuple[set[int], list[tuple[Node | Op, list[int]]]]:
    """Identities of the nodes whose values depend only on parameters; and all nodes that make or read such values.

    The latter come in reverse, each with those values that it reads.
    """
    program = maps.program
    fixed, movable = set(program.state()) - {after for _, after in program.updates}, set[int]()
    made: set[int] = set()
    for node in nodes:
        plain = isinstance(node, Op) and node.name in _ARRANGES and not node.mutated
        plain = plain or (isinstance(node, VectorOp) and node.share is None and bool(node.inputs))
        if plain and isinstance(node, (Op, VectorOp)) and fixed.issuperset(node.inputs):
            fixed.update(node.outputs)
            made.update(node.outputs)
            movable.add(id(node))
    uses = [(node, [v for v in reads(node) if v in made]) for node in reversed(nodes)]
    return movable, [(node, used) for node, used in uses if used or id(node) in movable]


def _only_for_state(maps: Maps, nodes: Sequence[Node | Op]) -> set[int]:
    """Identities of the computations on vectors that only the buffers and attributes written by a call depend on.

    They come last, in the order of the calls, so that no recomputed range of stages contains them.
    """
    wanted = set(maps.program.handed_out())
    late: set[int] = set()
    for node in reversed(nodes):
        only_vectors = isinstance(node, (Op, VectorOp)) and not any(v in maps for v in (*node.inputs, *node.outputs))
        if only_vectors and not wanted & set(makes(node)):
            late.add(id(node))
        else:
            wanted.update(reads(node))
    return late


def lower(program: Program, fallback: str | None = None) -> StagedProgram:
    """The steps of a recorded program; every map that a later stage reads is stored.

    Args:
        fallback: see `sort`.
    """
    divider = Divider(*sort(program, fallback))
    return divider.split(divider.crossing())
