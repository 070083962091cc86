"""The `torch.compile` backend "gigamorph", which computes TorchDynamo's graph of a network by tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from .capture.gaps import refuse_generators
from .capture.graph import Graph
from .errors import GigamorphError, UnsupportedError
from .execution.programs import PlanSettings
from .execution.runner import Runner
from .module.arguments import check_storage, tile_sides
from .tiling.memory import parse_bytes

_OPTIONS = ("memory_budget", "tile", "halos", "fallback")


def gigamorph(
    module: fx.GraphModule,
    examples: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compute a graph by tiles, within a memory budget, with the outputs and gradients of the whole image.

    ``torch.compile(net, backend="gigamorph", options={"memory_budget": "2GiB"})``. The image batch is the largest
    floating-point tensor (N, C, H, W) among the arguments of the call; it is on the device of the network.

    Args:
        module: Dynamo's graph of torch-level calls.
        examples: example inputs; only Dynamo's description of them is read.
        options: `memory_budget`, `tile`, `halos` and `fallback`, as in `gigamorph.accelerate`.
        mode: must be None; the backend has no modes.

    Raises:
        GigamorphError: for unknown options.
        UnsupportedError: for a graph that ends before the forward does (a graph break), unless `fallback` is "untiled".
    """
    if mode is not None:
        raise GigamorphError(f'backend "gigamorph" has no mode {mode!r}; pass options={{"memory_budget": "2GiB"}}')
    given = dict(options or {})
    for name in given:
        if name not in _OPTIONS:
            raise GigamorphError(f'unknown option {name!r} of backend "gigamorph"; choose from {", ".join(_OPTIONS)}')
    budget, halos, fallback = given.get("memory_budget"), given.get("halos", "auto"), given.get("fallback")
    fallback = check_storage(halos, fallback)
    limit = None if budget is None else parse_bytes(budget)
    settings = PlanSettings(limit, tile_sides(given.get("tile")), halos, fallback, None)
    refuse_generators()
    graph = Graph.of(module)
    if graph.piece and settings.fallback is None:
        raise UnsupportedError(
            f'the forward is not one graph: {graph.piece}; change that line, or pass options={{"fallback": "untiled"}}'
        )
    runner = Runner(settings)
    return lambda *inputs: runner.serve(graph, inputs)
