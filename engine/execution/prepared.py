"""Prepared programs: the steps of a network for one image size, with tiling, plan and captures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..capture.call_trees import refs
from ..capture.program import Op, makes_new_memory
from ..cuda_graphs import buffers
from ..cuda_graphs.replay import Replays
from ..cuda_graphs.step_checks import is_one_step
from ..cuda_graphs.whole_passes import MEMORY_SHARE, WholePasses, can_be_captured
from ..lowering.folding import Fold, folded_ops
from ..lowering.ops import VectorOp
from ..lowering.stages import ProgramStage, StagedProgram
from ..planning.call_memory import backward_bytes
from ..planning.estimate import bytes_in_files
from ..planning.graph_memory import keeps_graphs
from ..planning.interstage import brought
from ..planning.plan import Plan
from ..tiling.memory import available_bytes
from ..tiling.scan import Autocast
from ..tiling.spatial import SpatialShard
from ..tiling.stage import TiledStage
from . import whole_step


@dataclass(frozen=True)
class Segment:
    """A range of steps that are recomputed together in the backward.

    Attributes:
        steps: indices of the steps.
        inputs: values that they read.
        outputs: their values that later steps read.
        ends: values that are freed in the segment.
    """

    steps: range
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class ProgramKey:
    """The cache key of a prepared program, without its graph and further inputs.

    Attributes:
        shapes: shapes of the images that run the steps together.
        dtype: dtype of their pixels.
        device: device of the computation.
        training: whether there will be a backward.
        image_grads: which images require a gradient.
        wanting: which images have `requires_grad` in the network's view.
        strides: strides of the image tensors.
        in_memory: see `ImageBatch`.
        modes: gradient mode and inference mode.
        autocast: the autocast state.
        settings: tile, budget, storage of the halos, and fallback.
        triton: whether Triton kernels run.
        world: number of processes.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    training: bool
    image_grads: tuple[bool, ...]
    wanting: tuple[Hashable, ...]
    strides: tuple[tuple[int, ...] | None, ...]
    in_memory: bool
    modes: tuple[bool, bool]
    autocast: Autocast
    settings: tuple[Hashable, ...]
    triton: bool
    world: Hashable


@dataclass(frozen=True)
class Prepared:
    """A network made ready for one image size: its steps, the tiling of each stage, and the plan.

    Attributes:
        staged: the network, divided into stages.
        stages: the tiled stages.
        plan: the plan.
        replays: captured tiles by stage, with buffers in `arena`.
        whole: captured whole passes by stage.
        steps: the captured whole step, if any.
        arena: memory of the graph buffers.
        shard: this process's part of the image, if it is split.
    """

    staged: StagedProgram
    stages: tuple[TiledStage, ...]
    plan: Plan
    replays: dict[int, Replays] = field(default_factory=dict)
    whole: dict[int, WholePasses] = field(default_factory=dict)
    steps: list[whole_step.WholeStep] = field(default_factory=list)
    arena: buffers.SharedBuffers = field(default_factory=buffers.SharedBuffers)
    shard: SpatialShard | None = None

    @cached_property
    def last_use(self) -> dict[int, list[int]]:
        """The values whose last reader is a step, by the step's index."""
        return _last_uses(self.staged)

    @cached_property
    def whole_ops(self) -> list[tuple[Op, Fold | None, list[int], list[int]]]:
        """The ops for the whole image.

        Returns:
            for each: the op; see `folded_ops`; values that are not read after it; and values that it may overwrite,
            because ops made them in new memory and no other op reads them.
        """
        program = self.staged.program
        ops = folded_ops(program)
        readers = Counter(v for op, _ in ops for v in op.inputs)
        made = {v for op, _ in ops if makes_new_memory(op) for v in op.outputs if readers[v] == 1}
        every = zip(ops, program.ended([op for op, _ in ops]), strict=True)
        return [(*one, ended, [v for v in ended if v in made]) for one, ended in every]

    @cached_property
    def handed_out(self) -> frozenset[int]:
        """The values that are visible outside the network."""
        return frozenset(self.staged.program.handed_out())

    @cached_property
    def folded(self) -> frozenset[int]:
        """The values that stages compute under the name of a parameter."""
        return frozenset(v for stage in self.staged.stages for op in stage.prelude for v in op.outputs)

    @cached_property
    def always_reached(self) -> frozenset[int]:
        """The parameters that get a gradient from every differentiable result."""
        program = self.staged.program
        found = [program.reached.get(v, frozenset()) for v in refs(program.output)]
        return frozenset.intersection(*(reached for reached in found if reached)) if any(found) else frozenset()

    @cached_property
    def orders(self) -> dict[int, tuple[int, ...]]:
        """Memory order of the returned values in stock PyTorch: their dimensions, slowest first."""
        program = self.staged.program
        known = {v: program.values[v].order for v in program.given_away()}
        return {form: order for v, order in known.items() if order is not None for form in (v, program.form(v))}

    @cached_property
    def segments(self) -> dict[int, Segment]:
        """The segments that are recomputed, by their first step."""
        return {part.start: _segment(self.staged, part, self.last_use) for part in self.staged.segments}

    @cached_property
    def kept_for_backward(self) -> set[int]:
        """The values that steps read, without the updates of running statistics."""
        program = self.staged.program
        updated = {after for _, after in program.updates}

        def statistics(step: Op | VectorOp | ProgramStage) -> bool:
            if isinstance(step, ProgramStage) or not updated.issuperset(step.outputs):
                return False
            return isinstance(step, VectorOp) or not any(program.values[v].takes_grad for v in step.outputs)

        found = {v for part in self.segments.values() for v in part.inputs}
        return found.union(*(reads(step) for step in self.staged.steps if not statistics(step)))

    @cached_property
    def stage_maps(self) -> dict[int, int]:
        """The number of readers of each stored map that only stages read; empty if the image is split."""
        return self.staged.stage_maps() if self.shard is None else {}

    @cached_property
    def calls_backward(self) -> int:
        """Bytes that the backward of calls between the stages allocates; see `calls.backward_bytes`."""
        return backward_bytes(self.staged, self.staged.wanted(False)) if self.plan.training else 0

    @cached_property
    def in_files(self) -> int:
        """Resident bytes of the maps in files that a stage reads and writes."""
        maps = self.staged.stage_maps() if self.staged.place == "disk" else ()
        return max(bytes_in_files(maps, tiled) for tiled in self.stages)

    @cached_property
    def brought(self) -> frozenset[int]:
        """The values that autograd saves offloaded, and that a stage's backward loads to the device."""
        return frozenset() if self.staged.place == "device" or self.shard is not None else brought(self.staged)

    @cached_property
    def stage_number(self) -> dict[int, int]:
        """The index of a stage by the index of its step."""
        places = (number for number, step in enumerate(self.staged.steps) if isinstance(step, ProgramStage))
        return {number: index for index, number in enumerate(places)}

    @property
    def order(self) -> str:
        """A description of the order of the steps and of their backward."""
        return repr((self.staged.segments, [type(step).__name__ for step in self.staged.steps]))

    def free_captures(self) -> None:
        """Free all captures."""
        self.replays.clear()
        self.whole.clear()
        self.steps.clear()
        self.arena.chunks.clear()

    def whole_passes(self, number: int, device: torch.device) -> WholePasses | None:
        """The captured passes of the stage at an index of the steps, if it has few tiles and memory is ample."""
        index = self.stage_number[number]
        executor = buffers.executor(device) if self._may_be_whole else None
        if executor is None or (index in self.whole and self.whole[index].failed):
            return None
        if index not in self.whole:
            if self.plan.peak_bytes > MEMORY_SHARE * available_bytes(device):
                return None
            self.whole[index] = WholePasses(self.stages[index], executor)
        return self.whole[index]

    @cached_property
    def _may_be_whole(self) -> bool:
        alone = len(self.stages) == 1 and self.shard is None and self.plan.budget is None
        return alone and self.staged.place == "device" and can_be_captured(self.stages[0])

    def whole_step(self, device: torch.device) -> whole_step.WholeStep | None:
        """The captured step, if it has few tiles and memory is ample; all tiles retain their graphs if these fit."""
        executor = buffers.executor(device) if self._may_be_one_step else None
        if executor is None or any(step.failed for step in self.steps):
            return None
        if not self.steps:
            budget, free = self.plan.budget, available_bytes(device)
            retained = keeps_graphs(
                self.plan, self.stages, MEMORY_SHARE * free if budget is None else min(free, budget)
            )
            if retained is None:
                return None
            self.steps.append(whole_step.WholeStep(executor, retained))
        return self.steps[0]

    @cached_property
    def _may_be_one_step(self) -> bool:
        alone = self.shard is None and self.plan.halos == "device"
        return alone and is_one_step(self.staged, self.stages)

    def replay(self, number: int, device: torch.device) -> Replays | None:
        """The replays of the stage at an index of the steps, if the plan includes them."""
        index = self.stage_number[number]
        recomputed = self.stages[index].tiles > self.plan.retained_of(index)
        usable = self.plan.replayed and recomputed and self.shard is None and self.staged.place == "device"
        executor = buffers.executor(device) if usable else None
        if executor is not None and index not in self.replays:
            self.replays[index] = Replays(self.stages[index], executor, self.arena)
        return self.replays.get(index) if executor is not None else None


def makes(step: Op | VectorOp | ProgramStage) -> list[int]:
    if isinstance(step, ProgramStage):
        return [*step.results, *(v for op in step.prelude for v in op.outputs)]
    return list(step.outputs)


def reads(step: Op | VectorOp | ProgramStage) -> set[int]:
    if isinstance(step, ProgramStage):
        made = {v for op in step.prelude for v in op.outputs}
        return {*step.sources, *step.vectors, *(v for op in step.prelude for v in op.inputs)} - made
    return set(step.inputs)


def _last_uses(staged: StagedProgram) -> dict[int, list[int]]:
    """The values whose last reader is a step, by the step's index."""
    last: dict[int, int] = {}
    for number, step in enumerate(staged.steps):
        last.update(dict.fromkeys(reads(step), number))
        last.update((v, number) for op in (step.prelude if isinstance(step, ProgramStage) else ()) for v in op.outputs)
    kept = {*staged.program.results(), *staged.program.state()}
    kept -= {v for stage in staged.stages for op in stage.prelude for v in op.outputs}  # named as folded parameters
    uses: dict[int, list[int]] = {}
    for value, number in last.items():
        if value not in kept:
            uses.setdefault(number, []).append(value)
    return uses


def _segment(staged: StagedProgram, part: range, last_use: Mapping[int, list[int]]) -> Segment:
    """The segment of a range of steps, with its inputs and outputs."""
    steps = staged.steps
    inputs: dict[int, None] = {}
    made: dict[int, None] = {}
    for number in part:
        inputs.update(dict.fromkeys(v for v in reads(steps[number]) if v not in made))
        made.update(dict.fromkeys(makes(steps[number])))
    later = set(staged.program.results()).union(*(reads(step) for step in steps[part.stop :]))
    ends = tuple(v for number in part for v in last_use.get(number, ()))
    return Segment(part, tuple(inputs), tuple(v for v in made if v in later), ends)
