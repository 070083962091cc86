"""A network made ready for one image size: its steps, the tiling of each stage, and the plan."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..capture.call_trees import refs
from ..capture.program import Op
from ..cuda_graphs import buffers
from ..cuda_graphs.one_step import is_one_step
from ..cuda_graphs.replay import Replays
from ..cuda_graphs.whole import MEMORY_SHARE, WholePasses, can_be_captured
from ..lowering.ops import VectorOp
from ..lowering.stages import Stage, StagedProgram
from ..planning.calls import backward_bytes
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
    """Steps that are computed again in the backward, together.

    Attributes:
        steps: where they stand among the steps.
        inputs: values that they read.
        outputs: what later steps read of them.
        ends: values that are let go there.
    """

    steps: range
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class ProgramKey:
    """All that a prepared program was made for, besides its graph and further inputs.

    Attributes:
        shapes: of the images that go through the network side by side.
        dtype: of their pixels.
        device: where they are computed.
        training: whether there will be a backward.
        image_grads: which images want a gradient of their own.
        wanting: which images the network sees as wanting one.
        modes: gradient mode and inference mode.
        autocast: its state.
        settings: tile, budget and place of the halos.
        triton: whether kernels run.
        world: the processes that this one works with.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    training: bool
    image_grads: tuple[bool, ...]
    wanting: tuple[Hashable, ...]
    strides: tuple[tuple[int, ...] | None, ...]
    modes: tuple[bool, bool]
    autocast: Autocast
    settings: tuple[Hashable, ...]
    triton: bool
    world: Hashable


@dataclass(frozen=True)
class Prepared:
    """A network made ready for one image size: its steps, the tiling of each stage, and the plan.

    `replays` holds what has been captured of each stage's tiles, on tensors in `arena`, `whole` whole passes, and
    `steps` the whole step, if that is captured.
    `shard` is this process's part of the image, if that is split.
    """

    staged: StagedProgram
    stages: tuple[TiledStage, ...]
    plan: Plan
    replays: dict[int, Replays] = field(default_factory=dict)
    whole: dict[int, WholePasses] = field(default_factory=dict)
    steps: list[whole_step.WholeStep] = field(default_factory=list)
    arena: buffers.Arena = field(default_factory=buffers.Arena)
    shard: SpatialShard | None = None

    @cached_property
    def last_use(self) -> dict[int, list[int]]:
        """For each step, the values that are read there for the last time."""
        return _last_uses(self.staged)

    @cached_property
    def handed_out(self) -> frozenset[int]:
        """The values that someone outside gets hold of."""
        return frozenset(self.staged.program.handed_out())

    @cached_property
    def folded(self) -> frozenset[int]:
        """The values that stages make under the name of a parameter."""
        return frozenset(v for stage in self.staged.stages for op in stage.prelude for v in op.outputs)

    @cached_property
    def always_reached(self) -> frozenset[int]:
        """The parameters that a gradient comes to whichever results it comes from."""
        program = self.staged.program
        found = [program.reached.get(v, frozenset()) for v in refs(program.output)]
        return frozenset.intersection(*(reached for reached in found if reached)) if any(found) else frozenset()

    @cached_property
    def orders(self) -> dict[int, tuple[int, ...]]:
        """The dimensions of what is handed out as they lie in stock's memory, from the slowest to the fastest."""
        program = self.staged.program
        known = {v: program.values[v].order for v in program.given_away()}
        return {form: order for v, order in known.items() if order is not None for form in (v, program.form(v))}

    @cached_property
    def segments(self) -> dict[int, Segment]:
        """What is computed again, by the first step."""
        return {part.start: _segment(self.staged, part, self.last_use) for part in self.staged.segments}

    @cached_property
    def kept_for_backward(self) -> set[int]:
        """The values that a step other than the updates of norms' statistics reads."""
        program = self.staged.program
        updated = {after for _, after in program.updates}

        def statistics(step: Op | VectorOp | Stage) -> bool:
            if isinstance(step, Stage) or not updated.issuperset(step.outputs):
                return False
            return isinstance(step, VectorOp) or not any(program.values[v].takes_grad for v in step.outputs)

        found = {v for part in self.segments.values() for v in part.inputs}
        return found.union(*(reads(step) for step in self.staged.steps if not statistics(step)))

    @cached_property
    def stage_maps(self) -> dict[int, int]:
        """The stored maps that nothing but stages reads, and how many stages do; none of an image that is split."""
        return self.staged.stage_maps() if self.shard is None else {}

    @cached_property
    def calls_backward(self) -> int:
        """Bytes that the backward of a call between the stages takes; see `calls.backward_bytes`."""
        return backward_bytes(self.staged, self.staged.wanted(False)) if self.plan.training else 0

    @cached_property
    def in_files(self) -> int:
        """Bytes that are here of the maps in files that a stage reads and writes."""
        maps = self.staged.stage_maps() if self.staged.place == "disk" else ()
        return max(bytes_in_files(maps, tiled) for tiled in self.stages)

    @cached_property
    def brought(self) -> frozenset[int]:
        """What autograd keeps elsewhere between the passes, and a stage's backward brings to the device."""
        return frozenset() if self.staged.place == "device" or self.shard is not None else brought(self.staged)

    @cached_property
    def stage_number(self) -> dict[int, int]:
        """Which stage a step is, by its place among the steps."""
        places = (number for number, step in enumerate(self.staged.steps) if isinstance(step, Stage))
        return {number: index for index, number in enumerate(places)}

    @property
    def order(self) -> str:
        """What the order of the steps and of their backward depends on."""
        return repr((self.staged.segments, [type(step).__name__ for step in self.staged.steps]))

    def let_go(self) -> None:
        """Forget what has been captured."""
        self.replays.clear()
        self.whole.clear()
        self.steps.clear()
        self.arena.chunks.clear()

    def whole_passes(self, number: int, device: torch.device) -> WholePasses | None:
        """The captured passes of the stage at a place among the steps, where its tiles are few and memory is ample."""
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
        """The captured step, where the tiles are few and memory is ample; tiles keep their graphs if they all can."""
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
        """The replays of the stage at a place among the steps, if the plan has room for them."""
        index = self.stage_number[number]
        recomputed = self.stages[index].tiles > self.plan.retained_of(index)
        usable = self.plan.replayed and recomputed and self.shard is None and self.staged.place == "device"
        executor = buffers.executor(device) if usable else None
        if executor is not None and index not in self.replays:
            self.replays[index] = Replays(self.stages[index], executor, self.arena)
        return self.replays.get(index) if executor is not None else None


def makes(step: Op | VectorOp | Stage) -> list[int]:
    if isinstance(step, Stage):
        return [*step.results, *(v for op in step.prelude for v in op.outputs)]
    return list(step.outputs)


def reads(step: Op | VectorOp | Stage) -> set[int]:
    if isinstance(step, Stage):
        made = {v for op in step.prelude for v in op.outputs}
        return {*step.sources, *step.vectors, *(v for op in step.prelude for v in op.inputs)} - made
    return set(step.inputs)


def _last_uses(staged: StagedProgram) -> dict[int, list[int]]:
    """For each step, the values that are read there for the last time."""
    last: dict[int, int] = {}
    for number, step in enumerate(staged.steps):
        last.update(dict.fromkeys(reads(step), number))
        last.update((v, number) for op in (step.prelude if isinstance(step, Stage) else ()) for v in op.outputs)
    kept = {*staged.program.results(), *staged.program.state()}
    kept -= {v for stage in staged.stages for op in stage.prelude for v in op.outputs}  # named as what is folded
    uses: dict[int, list[int]] = {}
    for value, number in last.items():
        if value not in kept:
            uses.setdefault(number, []).append(value)
    return uses


def _segment(staged: StagedProgram, part: range, last_use: Mapping[int, list[int]]) -> Segment:
    """What goes in and out of a range of steps."""
    steps = staged.steps
    inputs: dict[int, None] = {}
    made: dict[int, None] = {}
    for number in part:
        inputs.update(dict.fromkeys(v for v in reads(steps[number]) if v not in made))
        made.update(dict.fromkeys(makes(steps[number])))
    later = set(staged.program.results()).union(*(reads(step) for step in steps[part.stop :]))
    ends = tuple(v for number in part for v in last_use.get(number, ()))
    return Segment(part, tuple(inputs), tuple(v for v in made if v in later), ends)
