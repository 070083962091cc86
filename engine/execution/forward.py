"""One forward of a network on one image batch: runs its steps in order, each stage as one autograd function.

Between the stages, vectors are computed by ordinary PyTorch. A stage takes its sources and vectors as tensors and
returns its reductions and stored maps as tensors, so autograd connects the stages.

Images of several sizes that share statistics (BatchNorm in training mode) are several forwards. They run the same steps
interleaved: each step runs for all forwards before the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels
from ..capture.program import Op, bind, call, in_order, in_stock_order, op_autocast, refs
from ..cuda_graphs.replay import Replays
from ..cuda_graphs.whole_passes import WholePasses
from ..lowering.folding import Fold, fold_together
from ..lowering.ops import VectorOp
from ..lowering.stages import ProgramStage, StagedProgram
from ..planning import constants
from ..tiling.arena import arena
from ..tiling.arena_limit import ArenaLimit
from ..tiling.forward import ForwardPass
from ..tiling.halos import copy_all
from ..tiling.memory import available_bytes
from ..tiling.memory_limit import MemoryLimit
from ..tiling.scan import Autocast, MapKeeping, Observer, Pixels, Scan, StoredMap, TileEvent
from ..tiling.stored_maps import Gradients
from ..torch_private import sequence_number, set_sequence_number
from .image_batch import ImageTensor, as_uploaded
from .offloaded import OffloadedTensors
from .prepared import Prepared
from .stage_function import ExecutionMode, OwnNode, StageFunction


class Forward:
    """The steps of a network on one image batch.

    Args:
        prepared: the network.
        image: the batch as a tensor, or None; it may require a gradient.
        pixels: the batch, read by region.
        device: the device of the computation.
        dtype: the dtype to which pixels are converted.
        state: parameters, buffers and constants by value number.
        on_tile: called after each tile.
        given: further input maps, read by region, by value number.
        targets: the tensors that `Program.updates` change, by the number of their value before the update.
        alone: whether captures and replays are disabled.
        retained: whether all tiles retain their graphs, independent of the plan.

    Attributes:
        observers: for maps that are returned block by block, the function that receives the blocks, by value number.
        single: whether no other forward shares the statistics and runs the steps together with this one.
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
        alone: bool = False,
        retained: bool = False,
    ):
        self.given, self.targets, self.alone, self.retained = given, targets or {}, alone, retained
        self.observers: dict[int, Observer] = {}
        self.single = True
        self.prepared, self.image, self.pixels = prepared, image, pixels
        self.device, self.dtype, self.on_tile = device, dtype, on_tile
        self.env = state
        program = prepared.staged.program
        # Results that are arguments or written tensors are returned as the user's own tensors.
        self.passed = {program.image: image, **{v: state.get(v) for v in program.inputs}}
        self.memory_limit: MemoryLimit | None = None
        self.gradients = Gradients()
        self.saved = OffloadedTensors(prepared.brought, prepared.staged.place)
        self._apart: dict[int, Tensor] = {}

    @property
    def whole_image(self) -> bool:
        """Whether PyTorch's own ops compute the whole image, all maps of the call being tensors on the device."""
        here = self.image is not None and self.image.device == self.device and not self.given
        return here and self.prepared.plan.untiled_bytes > 0

    def keep_to_plan(self, together: MemoryLimit | None = None) -> None:
        """Begin a step: on the CPU, limits the memory of this process to the plan from now on.

        Args:
            together: the limit of earlier forwards that share the budget, because their backward runs with this one.
        """
        plan, values = self.prepared.plan, self.prepared.staged.program.values
        if self.device.type == "cpu" and not self.whole_image:
            named = {values[v].name: t for v, t in self.env.items() if values[v].name is not None}
            held = sum(t.nbytes for t in named.values())
            there = [t.grad for t in named.values() if t.is_leaf and t.grad is not None]
            gradients = sum(grad.nbytes for grad in there)
            # The plan of a single stage without a budget includes the memory that the heap retains. For a given tile
            # without a budget nothing is predicted that could be a limit.
            strict = plan.budget is not None or (len(self.prepared.stages) > 1 and plan.tile_bytes > 0)
            found = arena()
            # The heap is limited to the predicted bytes; if all graphs are retained, or with an arena, the rest of the
            # budget may be used as well. The records are allocated already.
            every = sum(plan.retained_tiles) == sum(tiled.tiles for tiled in self.prepared.stages)
            whole = every or together is not None or found is not None
            limit = ((whole and plan.budget) or plan.peak_bytes) - plan.record_bytes
            if together is None:
                given = (limit, held, plan.library_bytes, plan.tile_bytes, strict)
                predicted = plan.peak_bytes - plan.record_bytes
                if found is None:
                    self.memory_limit = MemoryLimit(*given, gradients)
                else:
                    besides = self.prepared.calls_backward, self.prepared.in_files
                    self.memory_limit = ArenaLimit(*given, predicted, found, gradients, *besides)
            else:
                together.share(limit, plan.tile_bytes, strict)
                self.memory_limit = together

    def step(self, number: int, again: bool = False) -> None:
        """Run one step; `again` is true for a recomputation."""
        staged = self.prepared.staged
        step = staged.steps[number]
        if isinstance(step, ProgramStage):
            self.stage(number, again and any(number == part.stop - 1 for part in staged.segments))
        else:
            with self.saved.saving(step.inputs):
                run_vector_op(staged, step, self.env, self.device)
            self.saved.add(self.env, step.outputs)

    def free_values(self, number: int) -> None:
        """Free the values whose last reader is this step."""
        for value in self.prepared.last_use.get(number, ()):
            self.saved.forget(value, self.env.pop(value, None))

    def stage(self, number: int, deferred: bool = False) -> None:
        """Run the stage at an index of the steps; for `deferred` see `Scan.deferred`."""
        scan, tensors, vectors = self.scan(number, deferred)
        how = ExecutionMode(*self._captured(number), self.prepared.shard)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors.values(), *vectors)):
            places = {v: place for place, v in enumerate(tensors)}
            how = how._replace(parameters=self._parameters(scan.tiled.stage))
            results = StageFunction.apply(scan, how, self.saved, places, *tensors.values(), *vectors)
            self.take_over(scan.tiled.stage.results, results)  # pyright: ignore[reportArgumentType]
        else:
            captured = None if how.whole is None else how.whole.forward(scan, vectors)
            results = ForwardPass(scan, vectors, replay=how.replay).run() if captured is None else captured[0]
            self.env.update(zip(scan.tiled.stage.results, results, strict=True))

    def take_over(self, values: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Store the results of an autograd function; those that the network returns get their own node."""
        own = self.prepared.handed_out if len(tensors) > 1 else ()
        nodes = (OwnNode.apply(t) if v in own and t.requires_grad else t for v, t in zip(values, tensors, strict=True))
        self.env.update(zip(values, nodes, strict=True))  # pyright: ignore[reportArgumentType]

    def _parameters(self, stage: ProgramStage) -> list[nn.Parameter]:
        """The parameters on which a stage depends: among its vectors, and those that its vectors are folded from."""
        reached = frozenset[int]().union(*stage.reach.values())
        folded = (v for op in stage.prelude if not reached.isdisjoint(op.outputs) for v in op.inputs)
        read = (*(v for v in stage.vectors if v in reached), *folded)
        return [tensor for v in read if isinstance(tensor := self.env[v], nn.Parameter)]

    def _captured(self, number: int) -> tuple[WholePasses | None, Replays | None]:
        """The captures of a stage: whole passes, or equivalent tiles."""
        if self.alone:
            return None, None
        whole = self.prepared.whole_passes(number, self.device)
        return whole, self.prepared.replay(number, self.device) if whole is None else None

    def scan(self, number: int, deferred: bool = False) -> tuple[Scan, dict[int, Tensor], list[Tensor]]:
        """The scan of a stage, its source tensors by value number, and its vectors."""
        prepared, plan = self.prepared, self.prepared.plan
        stage = prepared.staged.steps[number]
        assert isinstance(stage, ProgramStage)
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
        observed = {r.value for r in stage.reductions} & self.observers.keys()
        tiled = prepared.stages[prepared.stage_number[number]]
        whole = self.single and tiled.tiles == 1 and prepared.shard is None
        scan = Scan(
            tiled=tiled,
            sources=sources,
            device=self.device,
            dtype=self.dtype,
            autocast=Autocast.current(self.device),
            halo_place=plan.halos,
            retained=self._retained(prepared.stage_number[number]),
            on_tile=self.on_tile,
            memory_limit=self.memory_limit,
            maps=MapKeeping(prepared.stage_maps, prepared.staged.place, self.gradients, prepared.orders),
            observers={v: [self.observers[v]] for v in observed},
            deferred=deferred,
            whole=whole,
        )
        self._prelude(stage, whole)
        reached = frozenset[int]().union(*stage.reach.values())
        vectors = [self.env[v] if v in reached else self.env[v].detach() for v in stage.vectors]
        return scan, {v: t if v in reached else t.detach() for v, t in tensors.items()}, vectors

    def _prelude(self, stage: ProgramStage, whole: bool) -> None:
        """Compute the vectors that the stage's rewrites need; on a GPU all norms are folded in one launch."""
        folds = [op for op in stage.prelude if isinstance(op.run, Fold)] if kernels.enabled(self.device) else []
        self.env.update(fold_together(folds, self.env))
        for op in stage.prelude:
            if whole and op.whole is not None:
                self.env.update(zip(op.outputs, op.whole(self.env), strict=True))
            elif not any(op is fold for fold in folds):
                run_vector_op(self.prepared.staged, op, self.env, self.device)

    def _retained(self, index: int) -> int:
        """The number of tiles of a stage that retain their graph: as planned, or on a GPU without a budget as fits."""
        if self.retained:
            return self.prepared.stages[index].tiles
        plan = self.prepared.plan
        planned = plan.retained_of(index)
        if plan.budget is not None or self.device.type == "cpu" or not planned:
            return planned
        return plan.retained_within(int(constants.FREE_SHARE * available_bytes(self.device)))

    def part(self, env: dict[int, Tensor], image: Tensor | None) -> Forward:
        """This forward with other values and another image tensor, for a segment of its steps."""
        pixels = self.pixels if image is None else ImageTensor(image)
        given = self.prepared, image, pixels, self.device, self.dtype, env, self.on_tile, self.given
        part = Forward(*given, alone=self.alone, retained=self.retained)
        part.memory_limit, part.gradients, part.single = self.memory_limit, self.gradients, self.single
        return part

    def output(self) -> list[Any]:
        """The outputs of the graph."""
        self._order_hooks()
        return self._bound(self.prepared.staged.program.output)

    def _order_hooks(self) -> None:
        """Make tensor hooks run in the order of stock PyTorch's backward: those of later tensors first.

        Autograd runs the ready node with the highest sequence number first. Here a tensor's node may be created before
        that of an earlier tensor, which a later stage computes.
        """
        tensors = [self.env.get(v) for v in sorted(self.prepared.handed_out)]
        nodes: list[Any] = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
        last = -1
        for node in dict.fromkeys(nodes):
            own = sequence_number(node)
            last = max(own, last + 1)
            if last > own:
                set_sequence_number(node, last)

    def _result(self, value: int) -> Tensor:
        """A value as it is returned; a value whose readers use another tensor gets its own node.

        A gradient with respect to it would be incomplete, so autograd reports it as unused.
        """
        program, form = self.prepared.staged.program, self.prepared.staged.program.form(value)
        # `pred.view(-1)` depends on the order.
        tensor = self.env[form] = in_order(self.env[form], self.prepared.orders.get(value, ()))
        if value not in program.apart or not tensor.requires_grad:
            return tensor
        if value not in self._apart:
            self._apart[value] = OwnNode.apply(tensor)  # pyright: ignore[reportArgumentType]
        return self._apart[value]

    def _bound(self, tree: Any) -> Any:
        """A tree of results with its tensors; those that no gradient flows through are detached."""
        program = self.prepared.staged.program
        left: dict[int, Tensor] = {}
        for v in refs(tree):
            tensor = self.passed.get(v)
            tensor = self._result(v) if tensor is None else tensor
            cut = program.grad and tensor.requires_grad and not program.values[v].differentiable
            left[v] = tensor.detach() if cut else tensor
        return bind(tree, left)

    def finish(self) -> list[Any]:
        """Write the updates of buffers and arguments, then return the outputs of the graph."""
        program = self.prepared.staged.program
        plain: list[tuple[Tensor, Tensor]] = []
        for before, after in program.updates:
            target = self.targets.get(before)
            if target is None:
                continue
            if before in program.assigned:
                target.data = self._result(after).detach()
                continue
            if target.is_inference() and not torch.is_inference_mode_enabled():
                target.data.copy_(self._result(after).detach())  # only `.data` may be written here
                continue
            grad = program.values[after].differentiable and not (target.is_leaf and target.requires_grad)
            if grad and torch.is_grad_enabled():
                target.copy_(self._result(after))
            else:
                plain.append((target, self._result(after)))
            self.passed[after] = target
        _write(plain)
        return self.output()


def _write(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy values into their tensors in few launches, or one by one if tensors share memory."""
    targets = {target.untyped_storage().data_ptr() for target, _ in pairs}
    apart = len(targets) == len(pairs) and targets.isdisjoint(v.untyped_storage().data_ptr() for _, v in pairs)
    for part in [pairs] if apart else [[pair] for pair in pairs]:
        copy_all(part)


def step_together(forwards: Sequence[Forward], number: int, again: bool = False) -> None:
    """Run one step of all forwards; see `Forward.step`."""
    ops = [step for f in forwards if isinstance(step := f.prepared.staged.steps[number], VectorOp) and step.share]
    if len(ops) > 1:
        _merge(ops, forwards)
    else:
        for forward in forwards:
            forward.step(number, again)
    for forward in forwards:
        forward.free_values(number)


def _merge(ops: Sequence[VectorOp], forwards: Sequence[Forward]) -> None:
    """Compute a statistic over all images."""
    first = ops[0]
    assert first.merge is not None
    results = first.merge([op.share(f.env) for op, f in zip(ops, forwards, strict=True) if op.share])
    for op, forward in zip(ops, forwards, strict=True):
        forward.env.update(zip(op.outputs, results, strict=True))


def run_vector_op(staged: StagedProgram, op: Op | VectorOp, env: dict[int, Tensor], device: torch.device) -> None:
    """Run an op on vectors or stored maps with ordinary autograd; it does not change its inputs."""
    if isinstance(op, VectorOp):
        env.update(zip(op.outputs, op.run(env), strict=True))
        return
    # If only the dtype and device of a map are read, an empty tensor replaces it.
    values = staged.program.values
    maps = {v: torch.empty(0, dtype=values[v].dtype, device=device) for v in staged.maps.inputs(op) if v not in env}
    with op_autocast(op, device):
        given = in_stock_order(op, values, {v: env[v] for v in op.inputs if v in env})
        env.update(zip(op.outputs, call(op, {**given, **maps}), strict=False))
