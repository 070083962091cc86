"""One forward of a network on one image batch: its steps in order, each sweep one function for autograd.

Between the sweeps smalls are computed by ordinary PyTorch. A sweep takes its sources and smalls as tensors and gives
its reductions and stored maps as tensors; autograd does the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from .graph import Graph, Network
from .ops import Small
from .plan import Plan
from .scan import Pixels, Scan, StoredMap, TileEvent, cast_dtype
from .sweep import Sweep
from .trace import Op, bind, refs


class ImageTensor:
    """An image batch that is a tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = tensor.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self.tensor[:, :, top:bottom, left:right]


class ScanFunction(torch.autograd.Function):
    """A sweep: (sources, smalls) -> (values of the reductions, stored maps)."""

    @staticmethod
    def forward(ctx: Any, scan: Scan, sources: dict[int, int], *tensors: Tensor):
        """`sources` gives the places of source tensors among `tensors`; smalls come behind them."""
        ctx.scan, ctx.sources = scan, sources
        wanted = [v for v, place in sources.items() if ctx.needs_input_grad[2 + place]]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        count = len(sources)
        results = scan.forward(tensors[count:], ctx.needs_input_grad[2 + count :], wanted)
        scan.let_go()
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        tensors = ctx.saved_tensors  # raises if one of them was changed in place since the forward
        count = len(ctx.sources)
        source_grads = {
            v: torch.zeros_like(tensors[place])
            for v, place in ctx.sources.items()
            if ctx.needs_input_grad[2 + place]
        }
        ctx.scan.take({v: tensors[place] for v, place in ctx.sources.items()})
        sums = ctx.scan.backward(grads, source_grads)
        ctx.scan.let_go()
        results: list[Tensor | None] = [source_grads.get(v) for v in ctx.sources]
        for value, small, wanted in zip(
            ctx.scan.sweep.graph.smalls, tensors[count:], ctx.needs_input_grad[2 + count :], strict=True
        ):
            total = sums.pop(value, None) if wanted else None
            results.append(torch.zeros_like(small) if wanted and total is None else total)
        return None, None, *results


@dataclass(frozen=True)
class Prepared:
    """A network made ready for one image size: its steps, the tiling of each sweep, and the plan."""

    network: Network
    sweeps: tuple[Sweep, ...]
    plan: Plan


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
    """

    def __init__(
        self, prepared: Prepared, image: Tensor | None, pixels: Pixels, device: torch.device, dtype: torch.dtype,
        state: dict[int, Tensor], on_tile: Callable[[TileEvent], None] | None,
    ):  # fmt: skip
        self.prepared, self.image, self.pixels = prepared, image, pixels
        self.device, self.dtype, self.on_tile = device, dtype, on_tile
        self.env = state
        self.last_use = _last_uses(prepared.network)

    def run(self, first: int = 0, end: int | None = None) -> None:
        """The steps from `first` up to (without) `end`; values that no later step reads are let go."""
        steps = self.prepared.network.steps
        for number in range(first, len(steps) if end is None else end):
            step = steps[number]
            if isinstance(step, Graph):
                self.sweep(number)
            else:
                run_small(self.prepared.network, step, self.env, self.device)
            for value in self.last_use.get(number, ()):
                self.env.pop(value, None)

    def sweep(self, number: int) -> None:
        """Run the sweep at a place among the steps."""
        scan, tensors, smalls = self.scan(number)
        graph = scan.sweep.graph
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors.values(), *smalls)):
            places = {v: place for place, v in enumerate(tensors)}
            results = ScanFunction.apply(scan, places, *tensors.values(), *smalls)
        else:
            results = scan.forward(smalls)
        self.env.update(zip(graph.results, results, strict=True))  # pyright: ignore[reportArgumentType]

    def scan(self, number: int) -> tuple[Scan, dict[int, Tensor], list[Tensor]]:
        """The scan of a sweep, its sources that are tensors, and its smalls."""
        network, plan = self.prepared.network, self.prepared.plan
        graph = network.steps[number]
        assert isinstance(graph, Graph)
        index = [i for i, step in enumerate(network.steps) if isinstance(step, Graph)].index(number)
        sources: dict[int, Pixels] = {}
        tensors: dict[int, Tensor] = {}
        for value in graph.sources:
            if value == graph.image:
                sources[value] = self.pixels
                if self.image is not None:
                    tensors[value] = self.image
            else:
                tensors[value] = self.env[value]
                sources[value] = StoredMap(self.env[value].detach(), graph.maps.axes[value])
        scan = Scan(
            self.prepared.sweeps[index], sources, self.device, self.dtype, plan.carries, plan.retained, self.on_tile
        )
        for step in graph.prelude:
            run_small(network, step, self.env, self.device)
        smalls = [self.env[v].to(cast_dtype(graph, v, self.env[v].dtype, scan.autocast)) for v in graph.smalls]
        return scan, tensors, smalls

    def output(self) -> Any:
        """What the network returns."""
        return bind(self.prepared.network.program.output, self.env)


def _reads(step: Op | Small | Graph) -> set[int]:
    if isinstance(step, Graph):
        made = {v for small in step.prelude for v in small.outputs}
        return {*step.sources, *step.smalls, *(v for small in step.prelude for v in small.inputs)} - made
    return set(step.inputs)


def _last_uses(network: Network) -> dict[int, list[int]]:
    """For each step, the values that are read there for the last time."""
    last: dict[int, int] = {}
    for number, step in enumerate(network.steps):
        last.update(dict.fromkeys(_reads(step), number))
    kept = {*refs(network.program.output)}
    kept.update(v for v, value in enumerate(network.program.values) if value.name or value.constant is not None)
    uses: dict[int, list[int]] = {}
    for value, number in last.items():
        if value not in kept:
            uses.setdefault(number, []).append(value)
    return uses


def run_small(network: Network, op: Op | Small, env: dict[int, Tensor], device: torch.device) -> None:
    """Run an op on smalls (or on maps that are stored whole) with ordinary autograd."""
    if isinstance(op, Small):
        env.update(zip(op.outputs, op.run(env), strict=True))
        if op.effect is not None:
            op.effect(env)
        return
    # A map that is only asked for its dtype and device is stood in for by an empty tensor.
    values = network.program.values
    maps = {v: torch.empty(0, dtype=values[v].dtype, device=device) for v in network.maps.inputs(op) if v not in env}
    scope = {**{v: env[v] for v in op.inputs if v in env}, **maps}
    with _autocast(op, device):
        result = op.func(*bind(op.args, scope), **bind(op.kwargs, scope))
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    # Calls that return nothing (an assignment to a slice) give a new value to the tensor they wrote to.
    if len(tensors) < len(op.outputs):
        tensors += [scope[v] for v in op.mutated][: len(op.outputs) - len(tensors)]
    env.update(zip(op.outputs, tensors, strict=False))


def _autocast(op: Op, device: torch.device):
    if op.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=op.autocast[1], enabled=op.autocast[0])

