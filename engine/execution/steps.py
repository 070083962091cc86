"""One forward of a network on one image batch: its steps in order, each stage one function for autograd.

Between the stages vectors are computed by ordinary PyTorch. A stage takes its sources and vectors as tensors and gives
its reductions and stored maps as tensors; autograd does the rest.

Images of several sizes whose statistics are merged (BatchNorm in training mode) are several forwards that go through
the same steps side by side: each step is done for all of them before the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..capture.program import call
from ..capture.trace import Op, bind, refs
from ..capture.trees import realize
from ..cuda_graphs import buffers
from ..cuda_graphs.replay import FEWEST_TILES, Replays
from ..images.pixels import PixelBatch, StoredBatch
from ..lowering.ops import VectorOp
from ..lowering.stages import Stage, StagedProgram
from ..module import turns
from ..module.once import once
from ..planning.plan import Plan
from ..tiling.halos import Rect
from ..tiling.memory_limit import MemoryLimit
from ..tiling.page_pool import PagePool
from ..tiling.scan import Pixels, Scan, StoredMap, TileEvent, cast_dtype
from ..tiling.spatial import SpatialShard
from ..tiling.stage import TiledStage
from ..tiling.stored_maps import Gradients, add_reader


class ImageTensor:
    """An image batch that is a tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = tensor.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self.tensor[:, :, top:bottom, left:right]


def as_uploaded(pixels: Pixels, device: torch.device) -> Pixels:
    """The image batch in the form in which its tiles go to a device: to a GPU as the files store them."""
    stored = StoredBatch.of(pixels) if isinstance(pixels, PixelBatch) and device.type == "cuda" else None
    return stored or pixels


class ScanFunction(torch.autograd.Function):
    """A stage: (sources, vectors) -> (values of the reductions, stored maps)."""

    @staticmethod
    def forward(ctx: Any, scan: Scan, sources: dict[int, int], *tensors: Tensor):
        """`sources` gives the places of source tensors among `tensors`; vectors come after them."""
        ctx.scan, ctx.sources, ctx.shard, ctx.turn = scan, sources, scan.shard, turns.current()
        wanted = [v for v, place in sources.items() if ctx.needs_input_grad[2 + place]]
        for v in wanted:
            add_reader(tensors[sources[v]], 1)
        ctx.set_materialize_grads(False)
        count = len(sources)
        results = scan.forward(tensors[count:], ctx.needs_input_grad[2 + count :], wanted)
        kept = [t for v, t in zip(scan.tiled.stage.results, results, strict=True) if v in scan.tiled.reread]
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        scan.let_go()
        return results

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None):
        saved = ctx.saved_tensors  # raises if one of them was changed in place since the forward
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        scan: Scan = ctx.scan
        tiled, stage = scan.tiled, scan.tiled.stage
        count, last = len(ctx.sources), not _keeps_graph()
        stored = dict(zip((v for v in stage.results if v in tiled.reread), kept, strict=True))
        scan.take({v: tensors[place] for v, place in ctx.sources.items()}, stored, tensors[count:])
        scan.gradients.end(stage.stored)
        reached = frozenset[int]().union(
            *(stage.reach[v] for v, grad in zip(stage.results, grads, strict=True) if grad is not None)
        )
        readers = [tensors[place] for place in ctx.sources.values() if ctx.needs_input_grad[2 + place]]
        wants = {
            v: tensors[place] for v, place in ctx.sources.items() if ctx.needs_input_grad[2 + place] and v in reached
        }
        try:
            source_grads, made = scan.source_grads(wants)
            sums = scan.backward(grads, source_grads, last)
        except BaseException:
            scan.gradients.clear()  # they are incomplete, and may live on in the error's traceback
            raise
        scan.let_go()
        for tensor in readers if last else ():
            add_reader(tensor, -1)
        if ctx.shard is not None:
            wanted = [v for v, want in zip(stage.vectors, ctx.needs_input_grad[2 + count :], strict=True) if want]
            vectors = dict(zip(stage.vectors, tensors[count:], strict=True))
            _sum_over_shards(ctx.shard, stage, {v: vectors[v] for v in wanted}, sums, source_grads)
        # Where no tile's graph has led to an input, none leads there: an op takes it and has no gradient for it.
        # But nothing is run for a map without elements, whose gradients are zeros.
        empty = any(0 in stage.maps.shape(v) for local in stage.locals for v in local.op.outputs)
        untouched = set[int]() if empty or ctx.shard is not None else made - scan.touched - scan.stage_maps.keys()
        results: list[Tensor | None] = [source_grads.get(v) if v in made - untouched else None for v in ctx.sources]
        for value, vector, wanted in zip(
            stage.vectors, tensors[count:], ctx.needs_input_grad[2 + count :], strict=True
        ):
            total = sums.pop(value, None) if wanted and value in reached else None
            results.append(
                torch.zeros_like(vector) if empty and wanted and value in reached and total is None else total
            )
        return None, None, *results


def _keeps_graph() -> bool:
    """Within a backward: whether there may be another one of the same graph (`retain_graph`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore


def _sum_over_shards(
    shard: SpatialShard,
    stage: Stage,
    wanted: dict[int, Tensor],
    sums: dict[int, Tensor],
    source_grads: dict[int, Tensor],
) -> None:
    """Add up what the processes have found, of `wanted` vectors and of sources that all of them have whole."""
    sixteen = (torch.float16, torch.bfloat16)
    for value, vector in wanted.items():
        if value not in sums:  # no tile of this band gave one
            sums[value] = torch.zeros_like(vector, dtype=torch.float32 if vector.dtype in sixteen else vector.dtype)
    whole = [v for v in source_grads if v not in (stage.offsets or {})]
    parts = [*(sums[v] for v in wanted), *(source_grads[v] for v in whole)]
    totals = shard.sum(parts) if parts else []
    sums.update(zip(wanted, totals, strict=False))
    source_grads.update(zip(whole, totals[len(wanted) :], strict=True))


@dataclass(frozen=True)
class Border:
    """What goes in and out of a range of steps: values it reads, what later steps read of it, what is let go there."""

    part: range
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """A network made ready for one image size: its steps, the tiling of each stage, and the plan.

    `replays` holds what has been captured of each stage's tiles, on tensors in `arena`. `shard` are the processes that
    share the image, if it is split.
    """

    network: StagedProgram
    stages: tuple[TiledStage, ...]
    plan: Plan
    replays: dict[int, Replays] = field(default_factory=dict)
    arena: buffers.Arena = field(default_factory=buffers.Arena)
    shard: SpatialShard | None = None

    @cached_property
    def last_use(self) -> dict[int, list[int]]:
        """For each step, the values that are read there for the last time."""
        return _last_uses(self.network)

    @cached_property
    def borders(self) -> dict[int, Border]:
        """The ranges that are computed again, by their first step."""
        return {part.start: _border(self.network, part, self.last_use) for part in self.network.ranges}

    @cached_property
    def kept_for_backward(self) -> set[int]:
        """The values that a step other than the updates of norms' statistics reads."""
        found = {v for part in self.borders.values() for v in part.inputs}
        return found.union(*(_reads(step) for step in self.network.steps if not isinstance(step, VectorOp)))

    @cached_property
    def stage_maps(self) -> dict[int, int]:
        """The stored maps that nothing but stages reads, and how many stages do; none of an image that is split."""
        return self.network.stage_maps() if self.shard is None else {}

    @cached_property
    def stage_number(self) -> dict[int, int]:
        """Which stage a step is, by its place among the steps."""
        places = (number for number, step in enumerate(self.network.steps) if isinstance(step, Stage))
        return {number: index for index, number in enumerate(places)}

    @property
    def order(self) -> str:
        """What the order of the steps and of their backward depends on."""
        return repr((self.network.ranges, [type(step).__name__ for step in self.network.steps]))

    def let_go(self) -> None:
        """Forget what has been captured."""
        self.replays.clear()
        self.arena.chunks.clear()

    def replay(self, index: int, device: torch.device) -> Replays | None:
        """The replays of a stage, if the plan has room for them."""
        usable = self.plan.replayed and self.shard is None and self.network.place == "device"
        executor = buffers.executor(device) if usable else None
        if executor is not None and index not in self.replays and self.stages[index].tiles >= FEWEST_TILES:
            self.replays[index] = Replays(self.stages[index], executor, self.arena)
        return self.replays.get(index) if executor is not None else None


class Forward:
    """The steps of a network on one image batch.

    Args:
        prepared: the network.
        image: the batch as a tensor, if it is one; a gradient may be wanted for it.
        pixels: the batch, read by region.
        device: where it is computed.
        dtype: what pixels are converted to.
        state: parameters, buffers and constants by value number.
        on_tile: called after each tile.
        given: further maps from outside, read by region.
        targets: the tensors that `Program.updates` change, by the value that they come with.

    Attributes:
        taps: by the number of a map that the network gives away as it is made, what gets its blocks.
    """

    def __init__(
        self,
        prepared: Prepared,
        image: Tensor | None,
        pixels: Pixels,
        device: torch.device,
        dtype: torch.dtype,
        state: dict[int, Tensor],
        on_tile: Callable[[TileEvent], None] | None,
        given: Mapping[int, Pixels],
        targets: Mapping[int, Tensor] | None = None,
    ):
        self.given, self.targets = given, targets or {}
        self.observers: dict[int, Callable[[Tensor, Rect], None]] = {}
        self.prepared, self.image, self.pixels = prepared, image, pixels
        self.device, self.dtype, self.on_tile = device, dtype, on_tile
        self.env = state
        program = prepared.network.program
        # Results that are arguments, and tensors that a call writes to: the user gets those themselves.
        self.passed = {program.image: image, **{v: state.get(v) for v in program.inputs}}
        self.memory_limit: MemoryLimit | None = None
        self.gradients = Gradients()

    def keep_to_plan(self, page_pool: PagePool) -> None:
        """Begin a step: from here on the memory of this process is kept within the plan's, on the CPU.

        Args:
            spare: pages of maps that are gone, for those of this step.
        """
        plan, values = self.prepared.plan, self.prepared.network.program.values
        if self.device.type == "cpu":
            held = sum(t.nbytes for v, t in self.env.items() if values[v].name is not None)
            # The plan of a single stage without a budget has room for what the heap keeps.
            strict = plan.budget is not None or len(self.prepared.stages) > 1
            self.memory_limit = MemoryLimit(plan.budget or plan.peak_bytes, held, plan.tile_bytes, page_pool, strict)

    def run(self, first: int = 0, end: int | None = None) -> None:
        """The steps from `first` up to (without) `end`; values that no later step reads are let go."""
        with (
            contextlib.nullcontext()
            if self.prepared.shard is None
            else self.prepared.shard.same_random_numbers(self.device)
        ):
            run_together([self], first, end)

    def step(self, number: int, again: bool = False) -> None:
        """Run one step; `again` says that this is not the first time."""
        network = self.prepared.network
        step = network.steps[number]
        if isinstance(step, Stage):
            self.tiled(number, again and any(number == part.stop - 1 for part in network.ranges))
        else:
            run_vector_op(network, step, self.env, self.device)

    def let_go(self, number: int) -> None:
        """Forget the values that no step after one reads."""
        for value in self.prepared.last_use.get(number, ()):
            self.env.pop(value, None)

    def tiled(self, number: int, deferred: bool = False) -> None:
        """Run the stage at a place among the steps; see `Scan.deferred`."""
        scan, tensors, vectors = self.scan(number)
        scan.deferred = deferred
        stage = scan.tiled.stage
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors.values(), *vectors)):
            places = {v: place for place, v in enumerate(tensors)}
            results = ScanFunction.apply(scan, places, *tensors.values(), *vectors)
        else:
            results = scan.forward(vectors)
        self.env.update(zip(stage.results, results, strict=True))  # pyright: ignore[reportArgumentType]

    def scan(self, number: int) -> tuple[Scan, dict[int, Tensor], list[Tensor]]:
        """The scan of a stage, its sources that are tensors, and its vectors."""
        network, plan = self.prepared.network, self.prepared.plan
        stage = network.steps[number]
        assert isinstance(stage, Stage)
        index = self.prepared.stage_number[number]
        sources: dict[int, Pixels] = {}
        tensors: dict[int, Tensor] = {}
        for value in stage.sources:
            if value == stage.image:
                sources[value] = as_uploaded(self.pixels, self.device)
                if self.image is not None:
                    tensors[value] = self.image
            elif value in self.given:
                sources[value] = self.given[value]
            else:
                tensors[value] = self.env[value]
                sources[value] = StoredMap(self.env[value].detach(), stage.maps.axes[value])
        scan = Scan(
            self.prepared.stages[index], sources, self.device, self.dtype, plan.halos, plan.retained, self.on_tile
        )
        scan.replay = self.prepared.replay(index, self.device)
        scan.shard = self.prepared.shard
        scan.observers = {r.value: [self.observers[r.value]] for r in stage.reductions if r.value in self.observers}
        scan.memory_limit, scan.gradients = self.memory_limit, self.gradients
        scan.stage_maps, scan.map_place = self.prepared.stage_maps, network.place
        for step in stage.prelude:
            run_vector_op(network, step, self.env, self.device)
        reached = frozenset[int]().union(*stage.reach.values())
        vectors = [
            (self.env[v] if v in reached else self.env[v].detach()).to(
                cast_dtype(stage, v, self.env[v].dtype, scan.autocast)
            )
            for v in stage.vectors
        ]
        return scan, {v: t if v in reached else t.detach() for v, t in tensors.items()}, vectors

    def part(self, env: dict[int, Tensor], image: Tensor | None) -> Forward:
        """This forward with other values and another image tensor, for a range of its steps."""
        pixels = self.pixels if image is None else ImageTensor(image)
        part = Forward(self.prepared, image, pixels, self.device, self.dtype, env, self.on_tile, self.given)
        part.memory_limit, part.gradients = self.memory_limit, self.gradients
        return part

    def output(self) -> Any:
        """What the network returns."""
        return realize(self._bound(self.prepared.network.program.output))

    def _bound(self, tree: Any) -> Any:
        """A tree of results with its tensors; those that no gradient flows through want none."""
        program = self.prepared.network.program
        left: dict[int, Tensor] = {}
        for v in refs(tree):
            tensor = self.passed.get(v)
            tensor = self.env[v] if tensor is None else tensor
            cut = program.grad and tensor.requires_grad and not program.values[v].differentiable
            left[v] = tensor.detach() if cut else tensor
        return bind(tree, left)

    def finish(self) -> Any:
        """The result, after what a call changes besides: buffers, arguments that it writes to, attributes."""
        program = self.prepared.network.program
        for before, after in program.updates:
            target = self.targets.get(before)
            if target is None:
                continue
            if before in program.assigned:
                target.data = self.env[after].detach()
                continue
            grad = program.values[after].differentiable and not (target.is_leaf and target.requires_grad)
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                target.copy_(self.env[after])
            self.passed[after] = target
        result = self.output()
        for effect in program.effects:
            effect.apply(self._bound)
        return result


def run_together(forwards: Sequence[Forward], first: int = 0, end: int | None = None) -> None:
    """The steps from `first` up to (without) `end` of forwards that have the same steps, side by side."""
    prepared = forwards[0].prepared
    number, end = first, len(prepared.network.steps) if end is None else end
    while number < end:
        border = prepared.borders.get(number)
        if border is not None and torch.is_grad_enabled():
            Recomputed.run(forwards, number)
            number = border.part.stop
        else:
            _step(forwards, number)
            number += 1


def _step(forwards: Sequence[Forward], number: int, again: bool = False) -> None:
    """Run one step of all forwards; see `Forward.step`."""
    vectors = [step for f in forwards if isinstance(step := f.prepared.network.steps[number], VectorOp) and step.share]
    if len(vectors) > 1:
        _merge(vectors, forwards)
    else:
        for forward in forwards:
            forward.step(number, again)
    for forward in forwards:
        forward.let_go(number)


def _merge(vectors: Sequence[VectorOp], forwards: Sequence[Forward]) -> None:
    """Compute a statistic of all images."""
    first = vectors[0]
    assert first.merge is not None
    results = first.merge([vector.share(f.env) for vector, f in zip(vectors, forwards, strict=True) if vector.share])
    for vector, forward in zip(vectors, forwards, strict=True):
        forward.env.update(zip(vector.outputs, results, strict=True))


class Recomputed(torch.autograd.Function):
    """A range of steps whose maps are let go, and computed again in the backward (Chen et al., 2016).

    It is one function of what goes into the range in all forwards that are side by side.
    """

    @staticmethod
    def run(forwards: Sequence[Forward], number: int) -> None:
        """Run the range that begins at a step and put what it makes and later steps read into the environments."""
        borders = [forward.prepared.borders[number] for forward in forwards]
        inputs, tensors = [], []
        for forward, border in zip(forwards, borders, strict=True):
            inputs.append(tuple(v for v in border.inputs if v in forward.env))  # a map may be read for its dtype alone
            tensors += [forward.env[v] for v in inputs[-1]]
            tensors += [] if forward.image is None else [forward.image]
        results = iter(Recomputed.apply(forwards, borders, inputs, *tensors))  # pyright: ignore[reportArgumentType]
        for forward, border in zip(forwards, borders, strict=True):
            forward.env.update((v, next(results)) for v in border.outputs)
            for value in border.ends:
                forward.env.pop(value, None)

    @staticmethod
    def forward(
        ctx: Any, wholes: Sequence[Forward], borders: list[Border], inputs: list[tuple[int, ...]], *tensors: Tensor
    ):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        for tensor, wanted in zip(tensors, ctx.needs_input_grad[3:], strict=True):
            add_reader(tensor, int(wanted))
        ctx.borders, ctx.inputs, ctx.turn = borders, inputs, turns.current()
        ctx.images = [whole.image is not None for whole in wholes]
        ctx.wholes = [whole.part({}, None) for whole in wholes]
        insides = _insides(wholes, inputs, ctx.images, tensors)
        with turns.RANDOM if any(tiled.random for tiled in wholes[0].prepared.stages) else contextlib.nullcontext():
            ctx.dice = _random_state(wholes[0].device)
            for number in borders[0].part:
                _step(insides, number)
            ctx.drawn = turns.dice()
        return tuple(inside.env[v] for inside, border in zip(insides, borders, strict=True) for v in border.outputs)

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None):
        last = not _keeps_graph()
        tensors = [
            t.detach().requires_grad_(wanted)
            for t, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        ]
        insides = _insides(ctx.wholes, ctx.inputs, ctx.images, tensors)
        device = insides[0].device
        gpus = [device] if device.type == "cuda" else []
        with torch.enable_grad(), turns.RANDOM, torch.random.fork_rng(devices=gpus):
            _set_random_state(ctx.dice, device)
            for number in ctx.borders[0].part:
                _step(insides, number, again=True)
            turns.check_drawn(ctx.drawn)
        roots = [i.env.pop(v) for i, border in zip(insides, ctx.borders, strict=True) for v in border.outputs]
        pairs = [(t, g) for t, g in zip(roots, grads, strict=True) if g is not None and t.requires_grad]
        wanted = [t for t in tensors if t.requires_grad]
        for inside in insides:
            inside.env.clear()
        del roots
        if not pairs:
            return None, None, None, *[None] * len(tensors)
        ends, end_grads = zip(*pairs, strict=True)
        del pairs
        results = iter(torch.autograd.grad(ends, wanted, end_grads, allow_unused=True))
        for tensor in wanted if last else ():
            add_reader(tensor, -1)
        return None, None, None, *(next(results) if t.requires_grad else None for t in tensors)


def _insides(
    wholes: Sequence[Forward], inputs: Sequence[tuple[int, ...]], images: Sequence[bool], tensors: Sequence[Tensor]
) -> list[Forward]:
    """The forwards of a range, on what goes into it: of each forward the values, and its image if that is a tensor."""
    left, insides = iter(tensors), []
    for whole, values, has_image in zip(wholes, inputs, images, strict=True):
        env = {v: next(left) for v in values}
        insides.append(whole.part(env, next(left) if has_image else None))
    return insides


def _random_state(device: torch.device) -> list[Tensor]:
    """The states of the random generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _makes(step: Op | VectorOp | Stage) -> list[int]:
    if isinstance(step, Stage):
        return [*step.results, *(v for vector in step.prelude for v in vector.outputs)]
    return list(step.outputs)


def _reads(step: Op | VectorOp | Stage) -> set[int]:
    if isinstance(step, Stage):
        made = {v for vector in step.prelude for v in vector.outputs}
        return {*step.sources, *step.vectors, *(v for vector in step.prelude for v in vector.inputs)} - made
    return set(step.inputs)


def _last_uses(network: StagedProgram) -> dict[int, list[int]]:
    """For each step, the values that are read there for the last time."""
    last: dict[int, int] = {}
    for number, step in enumerate(network.steps):
        last.update(dict.fromkeys(_reads(step), number))
    kept = {*network.program.results(), *network.program.state()}
    uses: dict[int, list[int]] = {}
    for value, number in last.items():
        if value not in kept:
            uses.setdefault(number, []).append(value)
    return uses


def _border(network: StagedProgram, part: range, last_use: Mapping[int, list[int]]) -> Border:
    """What goes in and out of a range of steps."""
    steps = network.steps
    inputs: dict[int, None] = {}
    made: dict[int, None] = {}
    for number in part:
        inputs.update(dict.fromkeys(v for v in _reads(steps[number]) if v not in made))
        made.update(dict.fromkeys(_makes(steps[number])))
    later = set(network.program.results()).union(*(_reads(step) for step in steps[part.stop :]))
    ends = tuple(v for number in part for v in last_use.get(number, ()))
    return Border(part, tuple(inputs), tuple(v for v in made if v in later), ends)


def run_vector_op(network: StagedProgram, op: Op | VectorOp, env: dict[int, Tensor], device: torch.device) -> None:
    """Run an op on vectors (or on maps that are stored whole) with ordinary autograd; what it reads stays as it is."""
    if isinstance(op, VectorOp):
        env.update(zip(op.outputs, op.run(env), strict=True))
        return
    # A map that is only asked for its dtype and device is stood in for by an empty tensor.
    values = network.program.values
    maps = {v: torch.empty(0, dtype=values[v].dtype, device=device) for v in network.maps.inputs(op) if v not in env}
    with _autocast(op, device):
        env.update(zip(op.outputs, call(op, {**{v: env[v] for v in op.inputs if v in env}, **maps}), strict=False))


def _autocast(op: Op, device: torch.device):
    if op.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=op.autocast[1], enabled=op.autocast[0])
