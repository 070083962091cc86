"""A stage as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..capture.higher_order import CALLED_WITH_NONE
from ..cuda_graphs.whole_passes import WholePasses
from ..errors import GigamorphError
from ..lowering.folding import Folded, Scaled
from ..lowering.geometry import Access
from ..lowering.ops import Local
from ..lowering.stages import ProgramStage
from ..module import locks
from ..module.first_order import first_order, note_memory
from ..tiling.arena import in_arena
from ..tiling.backward import BackwardPass, Replay
from ..tiling.forward import ForwardPass
from ..tiling.scan import Scan
from ..tiling.spatial import SpatialShard
from ..tiling.stored_maps import add_reader
from ..torch_private import function_of, is_used_up, keeps_graph
from .offloaded import OffloadedTensor, OffloadedTensors


class ExecutionMode(NamedTuple):
    """How a stage is computed.

    Attributes:
        whole: captured whole passes, if any.
        replay: captured tiles, if any.
        shard: the processes that share the image, if it is split.
        parameters: the parameters on which the stage depends.
    """

    whole: WholePasses | None = None
    replay: Replay | None = None
    shard: SpatialShard | None = None
    parameters: Sequence[nn.Parameter] = ()


class StageFunction(torch.autograd.Function):
    """A stage: (sources, vectors) -> (values of the reductions, stored maps)."""

    @staticmethod
    def forward(
        ctx: Any, scan: Scan, how: ExecutionMode, saved: OffloadedTensors, sources: dict[int, int], *tensors: Tensor
    ):
        """`sources` maps value numbers to indices of source tensors in `tensors`; vectors follow them."""
        ctx.how, ctx.sources, ctx.turn = how, sources, locks.current()
        note_memory(ctx, how.parameters)
        wants = ctx.needs_input_grad[4:]
        wanted = [v for v, place in sources.items() if wants[place]]
        for v in wanted:
            add_reader(tensors[sources[v]], 1)
        ctx.set_materialize_grads(False)
        count, tiled = len(sources), scan.tiled
        vectors, wanting = tensors[count:], wants[count:]
        captured = None if how.whole is None or wanted else how.whole.forward(scan, vectors, wanting)
        if captured is None:
            ctx.replayed, work = None, ForwardPass(scan, vectors, wanting, wanted, how.replay)
            results, kept = work.run(), work.kept
        else:
            results, ctx.replayed = captured
            kept = ctx.replayed.kept
        asked = {*wanted, *(v for v, want in zip(tiled.stage.vectors, wants[count:], strict=True) if want)}
        reach = tiled.stage.reach
        ctx.mark_non_differentiable(
            *(t for v, t in zip(tiled.stage.results, results, strict=True) if asked.isdisjoint(reach[v]))
        )
        reread = [t for v, t in zip(tiled.stage.results, results, strict=True) if v in tiled.reread]
        ctx.count = len(tensors)
        packed = {n: saved.pack(vector) for n, vector in enumerate(vectors, count)}
        ctx.elsewhere = {n: one for n, one in packed.items() if isinstance(one, OffloadedTensor)}
        ctx.save_for_backward(*(None if n in ctx.elsewhere else t for n, t in enumerate(tensors)), *reread)
        # Autograd itself saves stored maps and vectors between the passes, and frees them.
        ctx.scan, ctx.kept = scan.without_maps(), kept
        if kept is not None and not kept.recorded:
            kept.vectors = {}
        return results

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None):
        with in_arena(ctx.scan.device):
            return StageFunction._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx: Any, *grads: Tensor | None):
        saved = ctx.saved_tensors  # raises if one of them was changed in place since the forward
        tensors, reread = list(saved[: ctx.count]), saved[ctx.count :]
        wants = ctx.needs_input_grad[4:]
        count, last = len(ctx.sources), not keeps_graph()
        for place, one in ctx.elsewhere.items():
            tensors[place] = one.bring()
        ctx.elsewhere = {} if last else ctx.elsewhere
        scan: Scan = ctx.scan.with_maps({v: tensors[place] for v, place in ctx.sources.items()})
        stage = scan.tiled.stage
        stored = dict(zip((v for v in stage.results if v in scan.tiled.reread), reread, strict=True))
        scan.maps.gradients.end(stage.stored)
        reached = frozenset[int]().union(
            *(stage.reach[v] for v, grad in zip(stage.results, grads, strict=True) if grad is not None)
        )
        readers = [tensors[place] for place in ctx.sources.values() if wants[place]]
        wanted = {v: tensors[place] for v, place in ctx.sources.items() if wants[place] and v in reached}
        sums = None if ctx.replayed is None else ctx.replayed.backward(scan, grads, last)
        source_grads, made, touched = dict[int, Tensor](), set[int](), set[int]()
        if sums is None:
            work = BackwardPass(scan, ctx.kept, tensors[count:], stored, ctx.how.replay)
            touched = work.touched
            try:
                source_grads, made = work.source_grads(wanted)
                sums = work.run(grads, source_grads, last)
            except BaseException:
                scan.maps.gradients.clear()  # incomplete, and the error's traceback may hold them
                raise
        for tensor in readers if last else ():
            add_reader(tensor, -1)
        vectors = dict(zip(stage.vectors, tensors[count:], strict=True))
        asked = dict(zip(stage.vectors, wants[count:], strict=True))
        if ctx.how.shard is not None:
            _sum_over_shards(ctx.how.shard, stage, {v: t for v, t in vectors.items() if asked[v]}, sums, source_grads)
        # An input that no tile's graph reaches has no gradient, because the op that reads it returns none. But if
        # nothing is read of a map, its op does not run, and the gradients are zeros.
        empty = any(
            0 in stage.maps.shape(v) or _reads_nothing(local) for local in stage.locals for v in local.op.outputs
        )
        found = sums.keys() | touched
        skipped = set[int]().union(*(one.skips for one in stage.locals if found.isdisjoint(one.skips)))
        untouched = made - touched - scan.maps.readers.keys() - skipped
        untouched = set[int]() if empty or ctx.how.shard is not None else untouched
        results: list[Tensor | None] = [source_grads.get(v) if v in made - untouched else None for v in ctx.sources]
        for value, place in ctx.sources.items():
            if wants[place] and value not in reached:
                _refuse_visits(tensors[place], "a map of an earlier piece of the network")
        for value, vector in vectors.items():
            wanted_here = asked[value] and value in reached
            total = sums.pop(value, None) if wanted_here else None
            if total is None and wanted_here and (empty or value in skipped):
                total = torch.zeros_like(vector)
            if total is None and asked[value]:
                name = stage.program.values[value].name
                _refuse_visits(vector, f"parameter '{name}'" if name else "a tensor that weights are made of")
            results.append(total if total is None else _with_strides_of(vector, total))
        return None, None, None, None, *results


class OwnNode(torch.autograd.Function):
    """The identity, which gives a tensor its own autograd node.

    Hooks of a tensor belong to the node that made it. If that node made several tensors, a hook would be called with
    None when only another of them gets a gradient.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # pass on missing gradients as None
        return tensor.detach()

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor | None) -> Tensor | None:
        return grads[0]


def _reads_nothing(local: Local) -> bool:
    """Whether an op reads nothing of a map, because negative padding (`F.pad`) removes all of it."""

    def nothing(access: Access) -> bool:
        lo, hi = access.span(0, access.size_out)
        return hi <= lo

    return any(nothing(access) for pair in local.reads.values() for access in pair)


def _with_strides_of(vector: Tensor, grad: Tensor) -> Tensor:
    """A gradient with a vector's strides also along axes of size one, because DDP warns if they differ.

    This concerns 1x1 kernels, depthwise kernels and single input channels.
    """
    differ = (n > 1 and a != b for n, a, b in zip(vector.shape, vector.stride(), grad.stride(), strict=True))
    if grad.shape != vector.shape or grad.stride() == vector.stride() or any(differ):
        return grad
    return grad.as_strided(vector.shape, vector.stride())


def _refuse_visits(tensor: Tensor, what: str) -> None:
    """Raise an error if a missing gradient would have effects that stock PyTorch does not have.

    Autograd also runs the nodes behind an input whose gradient is None. Most nodes pass None on. But hooks of
    parameters are called with None, custom functions and backward hooks of modules get zeros, and nodes that an earlier
    backward freed fail.
    """
    edges, seen = [(tensor.grad_fn, tensor.output_nr)], set[Any]()
    if is_watched(tensor):
        raise unreached(f"{what} has a hook")
    while edges:
        edge = edges.pop()
        node, output = edge
        if node is None or edge in seen:
            continue
        seen.add(edge)
        leaf = getattr(node, "variable", None)
        if leaf is not None and is_watched(leaf):
            raise unreached(f"{what} has a hook")
        if isinstance(node, BackwardCFunction):
            maker: Any = function_of(node)
            if maker in (Folded, Scaled):
                edges += maker.inputs_of(node, output)
            elif maker in CALLED_WITH_NONE:
                edges += node.next_functions
            elif not maker.__module__.startswith(__name__.split(".")[0]):
                raise unreached(f"{what} is made by {maker.__name__}")
            continue  # stages check their own inputs
        if is_used_up(node):
            raise unreached(f"{what} was made before an earlier backward")
        edges += node.next_functions


def is_watched(leaf: Tensor) -> bool:
    """Whether a parameter has hooks."""
    return bool(leaf._backward_hooks or leaf._post_accumulate_grad_hooks)  # pyright: ignore[reportAttributeAccessIssue]


def unreached(what: str) -> GigamorphError:
    """The error for a hook or function that the loss does not reach but autograd would call."""
    return GigamorphError(
        f"{what}, and this loss does not reach it: PyTorch would call that with None or zeros; add 0 times an output "
        "that depends on it to the loss, or exclude it from this backward"
    )


def _sum_over_shards(
    shard: SpatialShard,
    stage: ProgramStage,
    wanted: dict[int, Tensor],
    sums: dict[int, Tensor],
    source_grads: dict[int, Tensor],
) -> None:
    """Sum the gradients of `wanted` vectors and of unsplit sources over the processes, in place."""
    sixteen = (torch.float16, torch.bfloat16)
    for value, vector in wanted.items():
        if value not in sums:  # no tile of this shard has a gradient
            sums[value] = torch.zeros_like(vector, dtype=torch.float32 if vector.dtype in sixteen else vector.dtype)
    whole = [v for v in source_grads if v not in (stage.offsets or {})]
    parts = [*(sums[v] for v in wanted), *(source_grads[v] for v in whole)]
    totals = shard.sum(parts) if parts else []
    sums.update(zip(wanted, totals, strict=False))
    source_grads.update(zip(whole, totals[len(wanted) :], strict=True))
